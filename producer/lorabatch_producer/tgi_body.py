"""The body of a TGI request, `{"inputs", "parameters"}`, as a job's fields, and the answer's body.

As in TGI a job is greedy unless `do_sample` is true or one of temperature, top_k and top_p asks for
sampling, and 100 tokens are generated unless it says how many. Otherwise than in TGI the text ends
before a stop string, not after it; `details.tokens` and `details.prefill` are empty. A parameter
that would change the outcome and that we do not compute is refused by name. Raises InvalidJob.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorabatch import Result
from lorabatch.errors import InvalidJob, shown
from lorabatch_producer.fields import only_these, without_nulls

__all__ = ["adapter_of", "generate_answer", "generate_fields"]

MAX_NEW_TOKENS = 100
SAME_NAME = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty"),
    *("frequency_penalty", "stop", "seed"),
)
FLAGS = ("do_sample", "return_full_text", "details")
# parameter: the values that ask for nothing beyond what we do
NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "top_n_tokens": (0,),
    "watermark": (False,),
    "decoder_input_details": (False,),
    "typical_p": (1, 1.0),
}
WARPERS: dict[str, tuple[object, ...]] = {
    "temperature": (None, 1.0),
    "top_k": (None, 0),
    "top_p": (None, 1.0),
}


def generate_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body as fields of a Job, sampling nested; what `adapter_id` means is for the caller."""
    only_these(without_nulls(body), {"inputs", "parameters"}, {"stream": (False,)}, "")
    inputs = body.get("inputs")
    if not isinstance(inputs, str):
        raise InvalidJob(f"inputs: wanted one text (got {shown(inputs)})")
    if not inputs:
        raise InvalidJob("inputs: the prompt is empty; give at least one character")
    given = _parameters(body)
    only_these(given, {"adapter_id", *SAME_NAME, *FLAGS}, NEUTRAL, "parameters.")
    for name in FLAGS:
        if not isinstance(given.get(name, False), bool):
            raise InvalidJob(f"parameters.{name}: wanted true or false (got {shown(given[name])})")
    sampled = given.get("do_sample") or any(
        given.get(name) not in neutral for name, neutral in WARPERS.items()
    )
    params = {name: given[name] for name in SAME_NAME if name in given}
    params.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    if sampled:
        params.setdefault("temperature", 1.0)
    else:
        params["temperature"] = 0.0
    return {"prompt": inputs, "sampling_params": params}


def adapter_of(body: Mapping[str, Any]) -> object:
    """Of a body that has been looked at; None: the base model."""
    return _parameters(body).get("adapter_id")


def _parameters(body: Mapping[str, Any]) -> dict[str, Any]:
    given = body.get("parameters") or {}
    if not isinstance(given, Mapping):
        raise InvalidJob(f"parameters: must be an object (got {shown(given)})")
    return without_nulls(given)


def generate_answer(body: Mapping[str, Any], result: Result) -> dict[str, Any]:
    """What TGI answers, for a job that succeeded."""
    given = _parameters(body)
    before = body["inputs"] if given.get("return_full_text") else ""
    answer: dict[str, Any] = {"generated_text": before + (result.text or "")}
    if given.get("details"):
        answer["details"] = {
            "finish_reason": result.finish_reason,
            "generated_tokens": result.usage.output_tokens,
            "seed": result.seed,
            "prefill": [],
            "tokens": [],
        }
    return answer
