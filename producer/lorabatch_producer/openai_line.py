"""One line of an OpenAI batch file as a job: `{"custom_id", "method", "url", "body"}`.

The adapter is `body.model`; the base model's own name means no adapter. What is left out has
OpenAI's default, not ours: temperature 1.0, and 16 tokens for /v1/completions (for chat, where
OpenAI has no limit, our 256). Beyond OpenAI's fields a body may hold top_k, min_p,
repetition_penalty, ignore_eos and priority. A field that would change the outcome and that we
do not compute is refused by name unless it is null or says what we do anyway; fields that only
label a request (user, metadata, store, ...) are left aside. Raises InvalidJob.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lorabatch.errors import InvalidJob, shown
from lorabatch.fields import ADAPTER_PATTERN

__all__ = ["CHAT_URL", "COMPLETIONS_URL", "openai_fields"]

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
COMPLETIONS_MAX_TOKENS = 16
LINE_FIELDS = {"custom_id", "method", "url", "body"}
SAME_NAME = (
    *("temperature", "top_p", "stop", "seed", "frequency_penalty", "presence_penalty"),
    *("top_k", "min_p", "repetition_penalty", "ignore_eos"),
)
LABELS = {
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "stream_options"),
}
# field: the values that ask for nothing beyond what we do
NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
PROMPT_FIELD = {CHAT_URL: "messages", COMPLETIONS_URL: "prompt"}


def openai_fields(line: Mapping[str, Any], base_names: frozenset[str] | None) -> dict[str, Any]:
    """The line as fields of a Job, sampling nested. Without names no `model` is an adapter."""
    unknown = sorted(set(line) - LINE_FIELDS)
    if unknown:
        raise InvalidJob(f"{unknown[0]}: no such field in a batch line; remove it")
    url, body = line.get("url"), line.get("body")
    if url not in PROMPT_FIELD:
        raise InvalidJob(f"url: wanted {CHAT_URL} or {COMPLETIONS_URL} (got {shown(url)})")
    if line.get("method", "POST") != "POST":
        raise InvalidJob(f"method: wanted POST (got {shown(line['method'])})")
    if line.get("custom_id") is None:
        raise InvalidJob("custom_id: missing; results are matched by it")
    if not isinstance(body, dict):
        raise InvalidJob(f"body: must be an object (got {shown(body)})")
    given = {name: value for name, value in body.items() if value is not None}
    _refuse_what_we_do_not_compute(given, url)
    fields: dict[str, Any] = {
        "custom_id": line["custom_id"],
        "adapter_id": _adapter(given.get("model"), base_names),
        "sampling_params": _sampling(given, url),
    }
    if "priority" in given:
        fields["priority"] = given["priority"]
    if url == COMPLETIONS_URL:
        return {**fields, "prompt": _prompt(given)}
    return {**fields, "messages": _messages(given)}


def _refuse_what_we_do_not_compute(given: Mapping[str, Any], url: str) -> None:
    known = {"model", "priority", "max_tokens", "max_completion_tokens", PROMPT_FIELD[url]}
    for name, value in given.items():
        if name in known or name in SAME_NAME or name in LABELS:
            continue
        # compared with their types: 1 == True in Python, not in JSON
        if any(type(value) is type(ours) and value == ours for ours in NEUTRAL.get(name, ())):
            continue
        raise InvalidJob(
            f"body.{name}: not supported, and leaving it out would change the outcome "
            f"(got {shown(value)}); remove it"
        )


def _adapter(model: object, base_names: frozenset[str] | None) -> str | None:
    if isinstance(model, str) and model:
        if base_names is None or model in base_names:
            return None
        if re.fullmatch(ADAPTER_PATTERN, model):
            return model
    names = " or ".join(sorted(base_names or ())) or "none"
    raise InvalidJob(
        f"body.model: wanted an adapter id or the base model's name, here {names} (what the "
        f"queue's workers have; before the first one LORABATCH_BASE_MODEL) (got {shown(model)})"
    )


def _sampling(given: Mapping[str, Any], url: str) -> dict[str, Any]:
    params = {name: given[name] for name in SAME_NAME if name in given}
    params.setdefault("temperature", 1.0)
    old, new = given.get("max_tokens"), given.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise InvalidJob(
            f"body.max_tokens {shown(old)} and body.max_completion_tokens {shown(new)} differ; "
            "give one of them"
        )
    limit = old if new is None else new
    if limit is not None:
        params["max_new_tokens"] = limit
    elif url == COMPLETIONS_URL:
        params["max_new_tokens"] = COMPLETIONS_MAX_TOKENS
    return params


def _prompt(given: Mapping[str, Any]) -> str:
    prompt = given.get("prompt")
    if not isinstance(prompt, str):
        raise InvalidJob(f"body.prompt: wanted one text (got {shown(prompt)}); one prompt a line")
    return prompt


def _messages(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidJob(f"body.messages: wanted a list of messages (got {shown(messages)})")
    return [_message(message, f"body.messages.{i}") for i, message in enumerate(messages)]


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidJob(f"{where}: must be an object (got {shown(message)})")
    extra = sorted(k for k, v in message.items() if k not in ("role", "content") and v is not None)
    if extra:
        raise InvalidJob(f"{where}.{extra[0]}: not supported; remove it")
    role = message.get("role")
    content = _content(message.get("content"), where)
    return {"role": "system" if role == "developer" else role, "content": content}


def _content(content: object, where: str) -> object:
    """A text, or OpenAI's list of parts when all of them are text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise InvalidJob(f"{where}.content: only text parts are supported (got {shown(part)})")
        texts.append(text)
    return "".join(texts)
