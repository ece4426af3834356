"""The body of an OpenAI request as a job's fields, and a job's result as the answer's body.

What is left out has OpenAI's default, not ours: temperature 1.0, and 16 tokens for
/v1/completions (for chat, where OpenAI has no limit, our 256). Beyond OpenAI's fields a body may
hold top_k, min_p, repetition_penalty, ignore_eos, structured_outputs and priority. A field that
would change the outcome and that we do not compute is refused by name unless it is null or says
what we do anyway; fields that only label a request (user, metadata, store, ...) are left aside.
Raises InvalidJob.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from lorabatch import Result
from lorabatch.errors import InvalidJob, shown
from lorabatch.result import Choice
from lorabatch_producer.fields import called, only_these, without_nulls
from lorabatch_producer.openai_choices import ASKED, Logprobs, choice_params
from lorabatch_producer.openai_messages import messages_of
from lorabatch_producer.structured_body import openai_structured
from lorabatch_producer.tool_calls import ASKED as TOOLS
from lorabatch_producer.tool_calls import assistant, tools_of

__all__ = ["CHAT_URL", "COMPLETIONS_URL", "answer_body", "body_fields"]

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"
COMPLETIONS_MAX_TOKENS = 16
SAME_NAME = (
    *("temperature", "top_p", "stop", "seed", "frequency_penalty", "presence_penalty"),
    *("top_k", "min_p", "repetition_penalty", "ignore_eos"),
)
STRUCTURED = {"response_format", "structured_outputs"}
LABELS = {
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "stream_options"),
}
# field: the values that ask for nothing beyond what we do
NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "top_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
}
PROMPT_FIELD = {CHAT_URL: "messages", COMPLETIONS_URL: "prompt"}
FINISH_REASONS = {"eos_token": "stop", "stop_sequence": "stop", "length": "length"}


def body_fields(body: Mapping[str, Any], url: str) -> dict[str, Any]:
    """The body as fields of a Job, sampling nested; what `model` means is for the caller to say."""
    given = without_nulls(body)
    known = {"model", "priority", "max_tokens", "max_completion_tokens", PROMPT_FIELD[url]}
    known |= set(ASKED[url == CHAT_URL])
    known |= TOOLS if url == CHAT_URL else set()
    only_these(given, known | set(SAME_NAME) | STRUCTURED | LABELS, NEUTRAL, "body.")
    fields: dict[str, Any] = {"sampling_params": _sampling(given, url)}
    if "priority" in given:
        fields["priority"] = given["priority"]
    if url == COMPLETIONS_URL:
        return {**fields, "prompt": _prompt(given)}
    return {**fields, "messages": messages_of(given), **tools_of(given)}


def answer_body(
    chat: bool, model: str | None, result: Result, tools: bool = False
) -> dict[str, Any]:
    """What OpenAI answers, for a job that succeeded. `model`: as the request named it; `tools`:
    whether it had some that its text may call."""
    choices = [_choice(chat, index, one) for index, one in enumerate(result.texts)]
    if tools:
        _tell_calls(choices, result.job_id)
    return {
        "id": ("chatcmpl-" if chat else "cmpl-") + result.job_id,
        "object": "chat.completion" if chat else "text_completion",
        "created": (result.finished_us or 0) // 1_000_000,
        "model": model,
        "choices": choices,
        "usage": {
            "prompt_tokens": result.usage.prompt_tokens,
            "completion_tokens": result.usage.output_tokens,
            "total_tokens": result.usage.total_tokens,
            "prompt_tokens_details": {"cached_tokens": result.usage.cached_tokens},
        },
        "system_fingerprint": _fingerprint(result),
    }


def _choice(chat: bool, index: int, one: Choice) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index}
    if chat:
        choice["message"] = {"role": "assistant", "content": one.text}
    else:
        choice["text"] = one.text
    choice["logprobs"] = Logprobs(chat).told(one.tokens)
    choice["finish_reason"] = FINISH_REASONS[one.finish_reason or "eos_token"]
    return choice


def _tell_calls(choices: Iterable[dict[str, Any]], job_id: str) -> None:
    for choice in choices:
        choice["message"] = assistant(choice["message"]["content"], job_id, choice["index"])
        if "tool_calls" in choice["message"] and choice["finish_reason"] == "stop":
            choice["finish_reason"] = "tool_calls"


def _fingerprint(result: Result) -> str:
    """The same for the same base model and version of an adapter."""
    what = f"{result.base_model}\n{result.adapter_version or ''}"
    return "fp_" + hashlib.sha256(what.encode()).hexdigest()[:16]


def _sampling(given: Mapping[str, Any], url: str) -> dict[str, Any]:
    params = {name: given[name] for name in SAME_NAME if name in given}
    params |= choice_params(given, url == CHAT_URL)
    params |= openai_structured(given)
    params.setdefault("temperature", 1.0)
    old, new = given.get("max_tokens"), given.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise InvalidJob(
            f"body.max_tokens: {shown(old)} and body.max_completion_tokens {shown(new)} differ; "
            "give one of them"
        )
    name, limit = ("max_tokens", old) if new is None else ("max_completion_tokens", new)
    if limit is not None:
        params["max_new_tokens"] = called(f"body.{name}", "max_new_tokens", limit)
    elif url == COMPLETIONS_URL:
        params["max_new_tokens"] = COMPLETIONS_MAX_TOKENS
    return params


def _prompt(given: Mapping[str, Any]) -> str:
    """Many clients send a list whatever they have."""
    prompt = given.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        (prompt,) = prompt
    if not isinstance(prompt, str):
        raise InvalidJob(
            f"body.prompt: wanted one text (got {shown(prompt)}); send a request, or a line of a "
            "batch, for each"
        )
    if not prompt:
        raise InvalidJob("body.prompt: the prompt is empty; give at least one character")
    return prompt
