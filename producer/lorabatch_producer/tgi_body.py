"""The body of a TGI request, `{"inputs", "parameters"}`, as a job's fields, and the answer's body.

As in TGI a job is greedy unless `do_sample` is true or one of temperature, top_k and top_p asks for
sampling, and 100 tokens are generated unless it says how many. Otherwise than in TGI the text ends
before a stop string, not after it, `details.prefill` is empty, and at the end of a stream so is
`details.tokens`; log probabilities are the model's own, before penalties and temperature. Texts of
`best_of` are told best first. A parameter that would change the outcome and that we do not compute
is refused by name. LoRAX's `merged_adapters`, `response_format` and `ignore_eos_token` are known.
Raises InvalidJob.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lorabatch import Result
from lorabatch.candidates import MAX_CANDIDATES, MAX_TOP_LOGPROBS
from lorabatch.errors import InvalidJob, shown
from lorabatch.result import Choice, LikelyToken
from lorabatch.streams import Piece
from lorabatch_producer.fields import only_these, without_nulls
from lorabatch_producer.openai_choices import only_one_streams
from lorabatch_producer.structured_body import tgi_structured

__all__ = ["adapter_of", "generate_answer", "generate_fields", "token_events"]

MAX_NEW_TOKENS = 100
SAME_NAME = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty"),
    *("frequency_penalty", "stop", "seed"),
)
FLAGS = ("do_sample", "return_full_text", "details", "ignore_eos_token")
LORAX = {"merged_adapters", "response_format"}
# parameter: the values that ask for nothing beyond what we do
NEUTRAL: dict[str, tuple[object, ...]] = {
    "watermark": (False,),
    "decoder_input_details": (False,),
}
WARPERS: dict[str, tuple[object, ...]] = {
    "temperature": (None, 1.0),
    "top_k": (None, 0),
    "top_p": (None, 1.0),
    "typical_p": (None, 1.0),
}


def generate_fields(body: Mapping[str, Any], streamed: bool = False) -> dict[str, Any]:
    """The body as fields of a Job, sampling nested; what `adapter_id` means is for the caller.
    `streamed`: for an answer that comes as it grows, which has one text."""
    only_these(without_nulls(body), {"inputs", "parameters"}, {"stream": (False,)}, "")
    inputs = body.get("inputs")
    if not isinstance(inputs, str):
        raise InvalidJob(f"inputs: wanted one text (got {shown(inputs)})")
    if not inputs:
        raise InvalidJob("inputs: the prompt is empty; give at least one character")
    given = _parameters(body)
    known = {"adapter_id", "grammar", "typical_p", "best_of", "top_n_tokens", *SAME_NAME, *FLAGS}
    only_these(given, known | LORAX, NEUTRAL, "parameters.")
    if streamed:
        only_one_streams(given)
    if "grammar" in given and "response_format" in given:
        raise InvalidJob("parameters.grammar: not with response_format; leave out one of both")
    for name in FLAGS:
        if not isinstance(given.get(name, False), bool):
            raise InvalidJob(f"parameters.{name}: wanted true or false (got {shown(given[name])})")
    warped = [name for name, neutral in WARPERS.items() if given.get(name) not in neutral]
    sampled = given.get("do_sample") or bool(warped)
    params = {name: given[name] for name in SAME_NAME if name in given}
    params |= {"typical_p": given["typical_p"]} if "typical_p" in warped else {}
    params |= _choices(given, sampled, told=bool(given.get("details")) or streamed)
    params |= tgi_structured(given)
    params.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    if sampled:
        params.setdefault("temperature", 1.0)
    else:
        params["temperature"] = 0.0
    if given.get("ignore_eos_token"):
        params["ignore_eos"] = True
    merged = {"merged_adapters": given["merged_adapters"]} if "merged_adapters" in given else {}
    return {"prompt": inputs, "sampling_params": params, **merged}


def _choices(given: Mapping[str, Any], sampled: bool, told: bool) -> dict[str, Any]:
    """What asks for several texts, and for their tokens where details are told."""
    best_of = _count(given, "best_of", 1, MAX_CANDIDATES)
    top = _count(given, "top_n_tokens", 0, MAX_TOP_LOGPROBS)
    if best_of > 1 and not sampled:
        raise InvalidJob(f"parameters.best_of: {best_of} texts want sampling; add do_sample true")
    if top and not told:
        raise InvalidJob(
            "parameters.top_n_tokens: told in details and in streams; add details true"
        )
    params: dict[str, Any] = {"best_of": best_of} if best_of > 1 else {}
    if told:
        params |= {"logprobs": True} | ({"top_logprobs": top} if top else {})
        params |= {"n": best_of} if best_of > 1 else {}
    return params


def _count(given: Mapping[str, Any], name: str, least: int, most: int) -> int:
    """`least` if it is not given."""
    value = given.get(name, least)
    if type(value) is not int or not least <= value <= most:
        raise InvalidJob(
            f"parameters.{name}: wanted a number from {least} to {most} (got {shown(value)})"
        )
    return value


def adapter_of(body: Mapping[str, Any]) -> object:
    """Of a body that has been looked at; None: the base model."""
    return _parameters(body).get("adapter_id")


def _parameters(body: Mapping[str, Any]) -> dict[str, Any]:
    given = body.get("parameters")
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InvalidJob(f"parameters: must be an object (got {shown(given)})")
    return without_nulls(given)


def generate_answer(
    body: Mapping[str, Any], result: Result, streamed: bool = False
) -> dict[str, Any]:
    """What TGI answers, for a job that succeeded. `streamed`: its tokens were told already."""
    given = _parameters(body)
    before = body["inputs"] if given.get("return_full_text") else ""
    if not given.get("details"):
        return {"generated_text": before + (result.text or "")}
    best, *others = sorted(result.texts, key=lambda one: one.mean_logprob, reverse=True)
    if streamed:
        best = best.model_copy(update={"tokens": None})
    top = bool(given.get("top_n_tokens")) and not streamed
    details = {"prompt_tokens": result.usage.prompt_tokens, **_details(best, top)}
    if others:
        details["best_of_sequences"] = [
            {"generated_text": before + one.text, **_details(one, top)} for one in others
        ]
    return {"generated_text": before + best.text, "details": details}


def token_events(body: Mapping[str, Any], piece: Piece) -> Iterator[dict[str, Any]]:
    """A piece of a stream token by token; its text is that of the last one that has some."""
    top = bool(_parameters(body).get("top_n_tokens"))
    plain = [place for place, token in enumerate(piece.tokens) if not token.special]
    if piece.text and not plain:  # of tokens that were told before
        yield {"token": {"id": -1, "text": piece.text, "logprob": 0.0, "special": False}}
    for place, token in enumerate(piece.tokens):
        text = piece.text if plain and place == plain[-1] else ""
        others = {"top_tokens": [_token(other) for other in token.top]} if top else {}
        yield {"token": {**_token(token), "text": text}, **others}


def _details(one: Choice, top: bool) -> dict[str, Any]:
    tokens = one.tokens or ()
    return {
        "finish_reason": one.finish_reason,
        "generated_tokens": len(one.token_ids),
        "seed": one.seed,
        "prefill": [],
        "tokens": [_token(token) for token in tokens],
        **({"top_tokens": [[_token(other) for other in t.top] for t in tokens]} if top else {}),
    }


def _token(token: LikelyToken) -> dict[str, Any]:
    return {
        "id": token.token_id,
        "text": token.text,
        "logprob": token.logprob,
        "special": token.special,
    }
