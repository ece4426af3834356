"""What may be asked of a text is checked when the job is accepted, and kept as it was said."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorabatch import Job, Ledger
from lorabatch.errors import InvalidJob

WHERE = "job 'j': sampling_params.structured_outputs"


def parsed(**wanted: Any) -> Job:
    params = {"structured_outputs": wanted}
    return Job.parse({"job_id": "j", "prompt": "Go", "sampling_params": params})


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {}


BAD: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, ": give exactly one of json, json_object, regex and choice, not none"),
    ({"regex": "a", "json": {}}, ": give exactly one of .*, not json and regex"),
    ({"json": [1]}, r"\.json: wanted a JSON schema that is an object"),
    ({"json": "{"}, r"\.json: wanted a JSON schema that is an object"),
    ({"json": {"a": float("nan")}}, r"\.json: wanted a JSON schema that is an object"),
    ({"json": {"enum": ["x" * 262_144]}}, r"\.json: the schema has 262\d+ bytes, allowed 262144"),
    ({"json": nested(64)}, r"\.json: the schema is over 64 objects and lists deep"),
    ({"json": {"a": "\ud800"}}, r"\.json: is not valid Unicode"),
    ({"json_object": False}, ": json_object is false"),
    ({"json_object": 1}, r"\.json_object: "),
    ({"regex": ""}, r"\.regex: "),
    ({"regex": "a" * 8193}, r"\.regex: "),
    ({"regex": "a\x00"}, r"\.regex: must not contain the NUL character"),
    ({"choice": []}, r"\.choice: "),
    ({"choice": ["a", "b", "a"]}, ": choice: wanted different texts, 'a' is there twice"),
    ({"choice": [str(i) for i in range(1001)]}, r"\.choice: "),
    ({"choice": [""]}, r"\.choice\.0: "),
    ({"grammar": "start: x"}, r"\.grammar: no such field"),
)


@pytest.mark.parametrize(("wanted", "why"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_is_refused(wanted: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidJob, match=WHERE + why):
        parsed(**wanted)


def test_it_must_be_able_to_end() -> None:
    params = {"structured_outputs": {"regex": "a"}, "ignore_eos": True}
    with pytest.raises(InvalidJob, match="ignore_eos: not with structured_outputs"):
        Job.parse({"prompt": "Go", "sampling_params": params})


def test_the_order_of_properties_is_kept_and_counts(ledger: Ledger) -> None:
    """It is the order in the answer. A database's JSON has another."""
    schema = {"properties": {"zebra": {}, "a": {}, "mule": {}}, "$id": "x"}
    job = parsed(json=schema)
    assert parsed(json=json.dumps(schema, indent=3)).request_hash() == job.request_hash()
    other = {"properties": {"a": {}, "zebra": {}, "mule": {}}, "$id": "x"}
    assert parsed(json=other).request_hash() != job.request_hash()
    ledger.accept([job])
    claimed = ledger.claim(["j"], "me", 60)["j"].job
    wanted = claimed.sampling_params.structured_outputs
    assert wanted is not None
    assert wanted == job.sampling_params.structured_outputs
    assert list(json.loads(wanted.json_schema or "")["properties"]) == ["zebra", "a", "mule"]
