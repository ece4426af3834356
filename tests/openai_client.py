"""OpenAI's own client, unmodified, for a server of ours, and what tests do with it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import openai
from openai.types import Batch

__all__ = ["CHAT_URL", "batch_of", "client_of", "ended", "line", "lines_in"]

CHAT_URL = "/v1/chat/completions"
LIMIT_S = 120.0


def client_of(url: str, tenant: str = "default") -> openai.OpenAI:
    headers = {"LoraBatch-Tenant": tenant}
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", default_headers=headers, max_retries=0, timeout=60.0
    )


def line(custom_id: object, url: str = CHAT_URL, model: str = "sql", body: Any = None) -> bytes:
    """One of a batch's file."""
    chat = {"model": model, "messages": [{"role": "user", "content": f"line {custom_id}"}]}
    fields = {"custom_id": str(custom_id), "method": "POST", "url": url, "body": body or chat}
    return json.dumps(fields).encode()


def batch_of(
    client: openai.OpenAI, lines: Sequence[bytes], endpoint: Any = CHAT_URL, **more: Any
) -> Batch:
    """Uploaded and made."""
    file = client.files.create(file=("in.jsonl", b"\n".join(lines)), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more
    )


def ended(client: openai.OpenAI, batch: Batch) -> Batch:
    """As it is then."""
    end_s = time.monotonic() + LIMIT_S
    while time.monotonic() < end_s:
        now = client.batches.retrieve(batch.id)
        if now.status in ("completed", "failed", "expired", "cancelled"):
            return now
        time.sleep(0.05)
    raise AssertionError(f"batch {batch.id} is still {now.status} after {LIMIT_S} s")


def lines_in(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """A file's lines, decoded."""
    assert file_id is not None, "there is no such file"
    return [json.loads(raw) for raw in client.files.content(file_id).content.splitlines()]
