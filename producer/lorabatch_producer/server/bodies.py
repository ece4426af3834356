"""What the bodies of requests may hold, for the OpenAPI document: names, limits, and what they do.

Limits are those of a job and its sampling. In a foreign body null is the same as a field that is
left out. The modules that read the bodies refuse what is not named here, and say more than a schema
can.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorabatch import Job, SamplingParams

__all__ = ["CHAT", "COMPLETION", "GENERATE", "JOB"]

OURS = {
    **Job.model_json_schema()["properties"],
    **SamplingParams.model_json_schema()["properties"],
}
OBJECT: dict[str, Any] = {"type": "object"}
TEXT: dict[str, Any] = {"type": "string"}
NULL: dict[str, Any] = {"type": "null"}
FLAG: dict[str, Any] = {"type": "boolean"}
MESSAGES: dict[str, Any] = {"type": "array", "items": OBJECT, "minItems": 1}
TOOLS: dict[str, Any] = {"type": "array", "items": OBJECT}
PROMPT: dict[str, Any] = {"type": ["string", "array"], "items": TEXT, "minItems": 1, "maxItems": 1}
STOP: dict[str, Any] = {"type": ["string", "array"], "items": TEXT}
Fields = Mapping[str, tuple[str, Mapping[str, Any] | None]]
"""What each does, and its schema; None: that of a job."""

WARPED: Fields = {
    "top_k": ("only the most likely k tokens; 0: all", None),
    "top_p": ("only the most likely tokens that have this much probability together", None),
    "min_p": ("only tokens with this part of the likeliest one's probability", None),
    "repetition_penalty": ("divides the logits of tokens of prompt and text; 1: none", None),
    "frequency_penalty": ("subtracted for each time that a token is in the text", None),
    "presence_penalty": ("subtracted for tokens that are in the text", None),
    "stop": ("the text ends before one of these", STOP),
    "seed": ("the same one draws the same; without it, one of the job's own", None),
}
OURS_ONLY: Fields = {
    "ignore_eos": ("go on until there are as many tokens as may be", None),
    "structured_outputs": (
        "what the text must be like: exactly one of `json` (a schema), `json_object`, `regex`, "
        "`choice`",
        OBJECT,
    ),
    "priority": ("higher runs first", None),
}
CALLS: Fields = {
    "tools": ("functions that the chat template tells the model of", TOOLS),
    "tool_choice": ("`auto`, `required`, or one function that is to be called", {}),
    "parallel_tool_calls": ("whether it may call more than once", FLAG),
}
OPENAI: Fields = {
    "temperature": ("0: the most likely token; OpenAI's default is 1", None),
    **WARPED,
    "n": ("how many texts", None),
    "logit_bias": ("added to tokens' logits, by their ids", None),
    "stream": ("tell the text as it grows, by server-sent events", FLAG),
    "stream_options": ("`include_usage`: the usage in a last event", OBJECT),
    "service_tier": ("`flex`: a priority of -10; `priority`: 10; `auto`, `default`", TEXT),
    **OURS_ONLY,
}
MODEL: Fields = {"model": ("an adapter's id, or the base model's name", TEXT)}


def _object(required: list[str], *parts: Fields, foreign: bool = True) -> dict[str, Any]:
    fields = {name: field for part in parts for name, field in part.items()}
    properties = {}
    for name, (text, schema) in fields.items():
        may_be_null = name not in required if foreign else NULL in OURS[name].get("anyOf", ())
        properties[name] = _property(text, OURS[name] if schema is None else schema, may_be_null)
    return {"type": "object", "required": required, "properties": properties}


def _property(text: str, schema: Mapping[str, Any], may_be_null: bool) -> dict[str, Any]:
    found = {key: value for key, value in schema.items() if key not in ("title", "default")}
    if may_be_null and "type" in found:
        kinds = found["type"]
        found["type"] = [*([kinds] if isinstance(kinds, str) else kinds), "null"]
    return {**found, "description": text}


SCORES = OURS["top_logprobs"]
LIMIT = ("how many tokens the text may have", OURS["max_new_tokens"])
CHAT = _object(
    ["model", "messages"],
    MODEL,
    {
        "messages": ("the conversation, each with `role` and `content`", MESSAGES),
        "max_completion_tokens": (f"{LIMIT[0]}; 256", LIMIT[1]),
        "max_tokens": ("its older name", LIMIT[1]),
    },
    OPENAI,
    {
        "logprobs": ("tell the log probabilities of the tokens", FLAG),
        "top_logprobs": ("and of so many likely ones beside each", None),
        "response_format": ("`text`, `json_object`, or `json_schema` with a schema", OBJECT),
        **CALLS,
    },
)
COMPLETION = _object(
    ["model", "prompt"],
    MODEL,
    {
        "prompt": ("what the text goes on from, without a chat template; or a list of it", PROMPT),
        "max_tokens": (f"{LIMIT[0]}; 16", LIMIT[1]),
    },
    OPENAI,
    {
        "best_of": ("the most likely ones of so many texts", None),
        "logprobs": ("tell log probabilities, and so many likely tokens beside each", SCORES),
        "response_format": ("`text`, `json_object`, or `json_schema` with a schema", OBJECT),
    },
)
GENERATE = _object(
    ["inputs"],
    {
        "inputs": ("what the text goes on from", TEXT),
        "parameters": (
            "`adapter_id` (without it, the base model), `max_new_tokens` (100), `do_sample`, "
            "`temperature`, `top_k`, `top_p`, `typical_p`, `repetition_penalty`, "
            "`frequency_penalty`, `stop`, `seed`, `best_of`, `details`, `top_n_tokens`, "
            "`return_full_text`, `grammar` (`json`, `json_schema` or `regex`), and LoRAX's "
            "`merged_adapters`, `response_format`, `ignore_eos_token`",
            OBJECT,
        ),
    },
)
JOB = _object(
    [],
    {
        "adapter_id": ("without it, the base model", TEXT),
        "prompt": ("what the text goes on from; or", TEXT),
        "messages": ("a conversation, by the chat template", MESSAGES),
        "tenant": ("the request's own: its key's, or the header's; may be left out", TEXT),
        "max_new_tokens": (f"{LIMIT[0]}; 256", None),
        "temperature": ("0, the default: the most likely token", None),
        **WARPED,
        "typical_p": ("only tokens about as surprising as is to be expected", None),
        "logit_bias": ("added to tokens' logits, by their ids", None),
        "n": ("how many texts", None),
        "best_of": ("the most likely ones of so many texts", None),
        "logprobs": ("tell the log probabilities of the tokens", None),
        "top_logprobs": ("and of so many likely ones beside each", None),
        **OURS_ONLY,
        **CALLS,
        "merged_adapters": ("several adapters as one: `ids`, `weights`, ...", OBJECT),
        "done_by": ("an ISO time with its zone; not ended by then, the job fails", TEXT),
        "idempotency_key": ("the same one is the same job; or the header", TEXT),
        "custom_id": ("of your own, told with the result", TEXT),
        "stream": ("send the text as it grows, for /jobs/{job_id}/events", FLAG),
        "webhook": ("a URL that is told of its end", TEXT),
    },
    foreign=False,
)
