"""Bad jobs and bad bulk lines, as data: what it is, the input, and what the error must say.

python tests/bad_inputs.py    prints each with the error it gets
"""

from __future__ import annotations

import json
from typing import Any

MANY = "x" * 600

# (what, fields on top of {"prompt": "hi"}, part of the message)
BAD_JOBS: list[tuple[str, Any, str]] = [
    ("a list instead of an object", [], "must be a JSON object, got a list"),
    ("a text instead of an object", "hi", "must be a JSON object"),
    ("a schema of tomorrow", {"schema_version": 2}, "schema_version 2 is not one"),
    ("a schema that is text", {"schema_version": "1"}, "schema_version '1' is not one"),
    ("no prompt", {"prompt": None}, "exactly one of prompt and messages, not neither"),
    (
        "prompt and messages",
        {"messages": [{"role": "user", "content": "x"}]},
        "exactly one of prompt and messages, not both",
    ),
    ("an empty prompt", {"prompt": ""}, "prompt is empty"),
    ("a prompt that is a number", {"prompt": 5}, "prompt: Input should be a valid string (got 5)"),
    ("NUL in the prompt", {"prompt": "a\x00b"}, "prompt: must not contain the NUL character"),
    ("a lone surrogate", {"prompt": "a\ud800"}, "prompt: Input should be a valid string, unable"),
    ("a prompt of 4 MB and one", {"prompt": "x" * 4_000_001}, "at most 4000000 characters"),
    ("no messages", {"prompt": None, "messages": []}, "messages: "),
    (
        "an unknown role",
        {"prompt": None, "messages": [{"role": "robot", "content": "x"}]},
        "messages.0.role: ",
    ),
    (
        "a message without content",
        {"prompt": None, "messages": [{"role": "user"}]},
        "messages.0.content: missing",
    ),
    (
        "NUL in a message",
        {"prompt": None, "messages": [{"role": "user", "content": "\x00"}]},
        "messages.0.content: must not contain the NUL",
    ),
    ("a misspelled field", {"promt": "x"}, "promt: no such field"),
    ("a misspelled sampling field", {"sampling_params": {"temp": 1}}, "sampling_params.temp: no"),
    ("an adapter that leaves the root", {"adapter_id": "../x"}, "adapter_id: "),
    ("an absolute adapter", {"adapter_id": "/etc"}, "adapter_id: "),
    ("an adapter of two slashes", {"adapter_id": "a/b/c"}, "adapter_id: "),
    ("an empty adapter", {"adapter_id": ""}, "adapter_id: "),
    ("NUL in the adapter", {"adapter_id": "a\x00"}, "adapter_id: "),
    ("a line end in the adapter", {"adapter_id": "sql\n"}, "adapter_id: "),
    ("a long adapter", {"adapter_id": "a" * 129}, "adapter_id: "),
    ("an empty tenant", {"tenant": ""}, "tenant: "),
    ("a formula as tenant", {"tenant": "=cmd()"}, "tenant: "),
    ("a line end in the tenant", {"tenant": "acme\n"}, "tenant: "),
    ("a long job id", {"job_id": "j" * 65}, "job_id: "),
    ("a job id with a space", {"job_id": "a b"}, "job_id: "),
    ("an empty key", {"idempotency_key": ""}, "idempotency_key: "),
    ("a long key", {"idempotency_key": MANY}, "idempotency_key: "),
    ("NUL in the custom id", {"custom_id": "\x00"}, "custom_id: must not contain the NUL"),
    ("a long custom id", {"custom_id": MANY}, "custom_id: "),
    ("a priority of 101", {"priority": 101}, "priority: Input should be less than or equal to 100"),
    ("no tokens", {"sampling_params": {"max_new_tokens": 0}}, "max_new_tokens: "),
    ("10^9 tokens", {"sampling_params": {"max_new_tokens": 10**9}}, "less than or equal to 131072"),
    ("half a token", {"sampling_params": {"max_new_tokens": 1.5}}, "max_new_tokens: "),
    ("a negative temperature", {"sampling_params": {"temperature": -0.1}}, "temperature: "),
    ("NaN temperature", {"sampling_params": {"temperature": float("nan")}}, "finite number"),
    ("infinite temperature", {"sampling_params": {"temperature": float("inf")}}, "temperature: "),
    ("top_p 0", {"sampling_params": {"top_p": 0}}, "top_p: Input should be greater than 0"),
    ("top_p above 1", {"sampling_params": {"top_p": 1.01}}, "top_p: "),
    ("top_k below 0", {"sampling_params": {"top_k": -1}}, "top_k: "),
    ("min_p above 1", {"sampling_params": {"min_p": 2}}, "min_p: "),
    ("a penalty of 0", {"sampling_params": {"repetition_penalty": 0}}, "repetition_penalty: "),
    ("a penalty of 3", {"sampling_params": {"presence_penalty": 3}}, "presence_penalty: "),
    ("an empty stop", {"sampling_params": {"stop": [""]}}, "stop.0: "),
    ("17 stops", {"sampling_params": {"stop": list("abcdefghijklmnopq")}}, "stop: "),
    ("NUL in a stop", {"sampling_params": {"stop": "\x00"}}, "stop: must not contain the NUL"),
    ("a negative seed", {"sampling_params": {"seed": -1}}, "seed: "),
    ("a seed of 64 bits", {"sampling_params": {"seed": 2**63}}, "seed: "),
]

CHAT: dict[str, Any] = {"model": "sql", "messages": [{"role": "user", "content": "hi"}]}


def chat(**fields: Any) -> bytes:
    """An OpenAI line whose body has these fields on top."""
    line = {"custom_id": "x", "method": "POST", "url": "/v1/chat/completions"}
    return json.dumps({**line, "body": {**CHAT, **fields}}).encode()


def line(**fields: Any) -> bytes:
    """An OpenAI line with these fields on top; None leaves one out."""
    whole = {"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}
    return json.dumps({k: v for k, v in {**whole, **fields}.items() if v is not None}).encode()


def short(**fields: Any) -> bytes:
    return json.dumps({"adapter_id": "sql", "prompt": "hi", **fields}).encode()


# (what, bytes of the line, code, part of the message)
BAD_LINES: list[tuple[str, bytes, str, str]] = [
    ("NUL", b'{"adapter_id": "a\x00"}', "nul", "NUL byte at byte 18"),
    ("bad UTF-8", b'{"prompt": "\xff"}', "not_utf8", "not UTF-8 at byte 13"),
    ("UTF-16", '{"a": 1}'.encode("utf-16"), "nul", "NUL byte"),
    ("a line of 10 MB", short(prompt="x" * 10_000_000), "line_too_long", "longer than 8388608"),
    ("no JSON", b"hello", "not_json", "not valid JSON: Expecting value at 1"),
    ("a line that is cut", b'{"adapter_id": "sql", "pro', "not_json", "not valid JSON"),
    ("two objects", b"{} {}", "not_json", "Extra data"),
    ("deep nesting", b"[" * 200_000, "not_json", ""),
    ("a number of 5000 digits", b"1" * 5000, "not_json", "not valid JSON"),
    ("a field twice", b'{"prompt": "a", "prompt": "b"}', "not_json", "'prompt' is given twice"),
    ("an array", b"[1]", "not_object", "must be a JSON object (got a list of 1)"),
    ("null", b"null", "not_object", "must be a JSON object (got None)"),
    ("a misspelled field", short(temprature=1), "invalid_job", "temprature: no such field"),
    ("a job id of one's own", short(job_id="x"), "invalid_job", "job_id: no such field"),
    ("no adapter", b'{"prompt": "a"}', "invalid_job", "adapter_id: missing"),
    ("no prompt", b'{"adapter_id": "sql"}', "invalid_job", "exactly one of prompt and messages"),
    ("a number as custom id", short(custom_id=5), "invalid_job", "custom_id: "),
    ("an escaped NUL", short(prompt="\x00"), "invalid_job", "prompt: must not contain the NUL"),
    ("a surrogate", short(custom_id="\ud800"), "invalid_job", "custom_id: Input should be a valid"),
    ("seed twice", short(seed=1, sampling_params={"seed": 2}), "invalid_job", "given flat and in"),
    ("NaN", b'{"adapter_id": "a", "prompt": "a", "top_p": NaN}', "invalid_job", "top_p: "),
    ("an unknown url", line(url="/v1/embeddings"), "invalid_job", "url: wanted /v1/chat"),
    ("no url", line(url=None), "invalid_job", "url: wanted /v1/chat"),
    ("GET", line(method="GET"), "invalid_job", "method: wanted POST (got 'GET')"),
    ("no custom id", line(custom_id=None), "invalid_job", "custom_id: missing"),
    ("a stranger in the line", line(tenant="b"), "invalid_job", "tenant: no such field in a batch"),
    ("a body that is text", line(body="x"), "invalid_job", "body: must be an object"),
    ("no model", chat(model=None), "invalid_job", "body.model: wanted an adapter id"),
    (
        "a model that is a path",
        chat(model="../x"),
        "invalid_job",
        "body.model: wanted an adapter id",
    ),
    ("no messages", chat(messages=[]), "invalid_job", "body.messages: wanted a list"),
    ("a message that is text", chat(messages=["hi"]), "invalid_job", "body.messages.0: must be"),
    (
        "an image",
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        "invalid_job",
        "body.messages.0.content: only text parts",
    ),
    (
        "tool calls",
        chat(messages=[{"role": "assistant", "content": "", "tool_calls": [1]}]),
        "invalid_job",
        "messages.0.tool_calls.0: ",
    ),
    ("too many choices", chat(n=17), "invalid_job", "sampling_params.n: "),
    ("n of true", chat(n=True), "invalid_job", "sampling_params.n: "),
    ("streaming", chat(stream=True), "invalid_job", "body.stream: not supported"),
    ("a tool without a function", chat(tools=[{}]), "invalid_job", "body.tools.0: wanted an "),
    (
        "a chat's logprobs as a number",
        chat(logprobs=1),
        "invalid_job",
        "sampling_params.logprobs: ",
    ),
    (
        "a JSON schema",
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x"}}),
        "invalid_job",
        "body.response_format.json_schema.schema: missing",
    ),
    ("a large bias", chat(logit_bias={"1": 500}), "invalid_job", "sampling_params.logit_bias"),
    ("a field of tomorrow", chat(verbosity="low"), "invalid_job", "body.verbosity: not supported"),
    ("a prompt in a chat", chat(prompt="x"), "invalid_job", "body.prompt: not supported"),
    ("two limits", chat(max_tokens=1, max_completion_tokens=2), "invalid_job", "differ"),
    ("a hot temperature", chat(temperature=99), "invalid_job", "sampling_params.temperature: "),
    (
        "a list of prompts",
        line(url="/v1/completions", body={"model": "sql", "prompt": ["a", "b"]}),
        "invalid_job",
        "body.prompt: wanted one text",
    ),
]


def print_all() -> None:
    from io import BytesIO
    from uuid import uuid4

    from lorabatch import Job
    from lorabatch.errors import InvalidJob
    from lorabatch_producer.bulk import read_lines

    for what, fields, _ in BAD_JOBS:
        try:
            Job.parse({"prompt": "hi", **fields} if isinstance(fields, dict) else fields)
        except InvalidJob as error:
            print(f"{what:32} {error}")
    for what, raw, _, _ in BAD_LINES:
        for bad in read_lines(BytesIO(raw), str(uuid4()), "t", frozenset()):
            print(f"{what:32} {bad}")


if __name__ == "__main__":
    print_all()
