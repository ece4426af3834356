"""examples/flask_webhook, as it would run: its own process, and `lorabatch serve` in another."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from lorabatch import Ledger, Settings
from lorabatch.database import open_database
from lorabatch.webhook_secrets import Secrets
from lorabatch_producer.webhooks import ID, SIGNATURE, TIMESTAMP, signature
from tests.played_worker import by_adapter, working

EXAMPLE = Path(__file__).parents[3] / "examples" / "flask_webhook" / "app.py"
LIMIT_S = 60.0


@pytest.fixture
def engine(settings: Settings) -> Iterator[sa.Engine]:
    engine = open_database(settings)
    yield engine
    engine.dispose()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def running(command: Sequence[str], env: dict[str, str], url: str, log: Path) -> Iterator[None]:
    """A process, once it answers at this URL with whatever it says."""
    with log.open("wb") as output:
        arguments = [sys.executable, "-m", *command]
        process = subprocess.Popen(
            arguments, env={**os.environ, **env}, stdout=output, stderr=output
        )
    try:
        end_s = time.monotonic() + LIMIT_S
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end_s, "it did not start in time"
            with contextlib.suppress(httpx.TransportError):
                httpx.get(url)
                break
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


def told(shop: httpx.Client, job_id: str) -> object:
    """What the shop has heard of a job."""
    end_s = time.monotonic() + LIMIT_S
    while (answer := shop.get(f"/answers/{job_id}")).status_code == 404:
        assert time.monotonic() < end_s, "it was not told"
        time.sleep(0.05)
    return answer.json()


def test_a_flask_app_is_told_of_its_jobs(
    settings: Settings, engine: sa.Engine, valkey_url: str, tmp_path: Path
) -> None:
    port, api = free_port(), free_port()
    secret = Secrets(engine).create("shop").secret
    url = f"http://127.0.0.1:{port}"
    ours = {"HOME": str(settings.home), "BROKER_URL": valkey_url}
    ours |= {"WEBHOOK_PRIVATE": "1", "WEBHOOK_PORTS": "any"}
    env = {f"LORABATCH_{name}": value for name, value in ours.items()}
    env |= {"WEBHOOK_URL": f"{url}/hook", "WEBHOOK_SECRET": secret}
    flask = ["flask", "--app", str(EXAMPLE), "run", "--port", str(port)]
    serve = ["lorabatch_producer.cli", "serve", "--port", str(api)]
    healthz = f"http://127.0.0.1:{api}/healthz"
    with (
        running(flask, env, url, tmp_path / "flask.log"),
        running(serve, env, healthz, tmp_path / "serve.log"),
        working(Ledger(engine), by_adapter),
        httpx.Client(base_url=url, timeout=30.0) as shop,
    ):
        asked = [
            shop.post("/ask", data={"prompt": "hi", "adapter_id": adapter}).json()["job_id"]
            for adapter in ("sql", "broken")
        ]
        assert [told(shop, job_id) for job_id in asked] == [
            {"type": "job.succeeded", "text": "sql: hi"},
            {"type": "job.failed", "text": None},
        ]
        assert shop.post("/ask", data={}).status_code == 422
        body = b'{"type": "job.succeeded", "data": {"job_id": "forged", "text": "x"}}'
        at_s = int(time.time())
        forged = "whsec_" + "A" * 32
        headers = {ID: "msg_x", TIMESTAMP: str(at_s)}
        headers[SIGNATURE] = signature(forged, "msg_x", at_s, body)
        assert shop.post("/hook", content=body, headers=headers).status_code == 401
        assert shop.get("/answers/forged").status_code == 404
