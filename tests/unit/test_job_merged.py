"""Jobs of merged adapters: what is refused, what LoRAX's clients send, how a merge is called."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from lorabatch import Job, Ledger
from lorabatch.errors import IdempotencyConflict, InvalidJob
from lorabatch.fields import ADAPTER_PATTERN
from lorabatch.job import MergedAdapters
from lorabatch.tables import jobs

TIES = {"merge_strategy": "ties", "density": 0.5}

# (what, fields on top of {"ids": ["sql", "acme/xml"]}, part of the message)
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("no ids", {"ids": None}, "ids: Input should be a valid tuple (got None)"),
    ("one id", {"ids": ["a"]}, "ids: Tuple should have at least 2 items"),
    ("17 ids", {"ids": [f"a{n}" for n in range(17)]}, "ids: Tuple should have at most 16 items"),
    ("an id twice", {"ids": ["a", "b", "a"]}, "ids: wanted different adapters, 'a' is there twice"),
    ("a path", {"ids": ["a", "../b"]}, "ids.1: wanted NAME or OWNER/NAME"),
    ("a merge of merges", {"ids": ["a", "merged/b"]}, "ids.1: the owner 'merged' stands for"),
    ("three weights", {"weights": [1, 2, 3]}, "weights: wanted 2, one for each of ids (got a list"),
    ("no weights", {"weights": []}, "weights: wanted 2, one for each of ids (got a list of 0)"),
    ("a text", {"weights": [1, "2"]}, "weights.1: Input should be a valid number (got '2')"),
    ("true", {"weights": [1, True]}, "weights.1: Input should be a valid number (got True)"),
    ("NaN", {"weights": [1, float("nan")]}, "weights.1: Input should be a finite number"),
    ("cat", {"merge_strategy": "cat"}, "merge_strategy: Input should be 'linear', 'ties', "),
    ("a list", {"merge_strategy": []}, "merge_strategy: Input should be 'linear', 'ties', "),
    ("ties of all", {"merge_strategy": "ties"}, "density: ties wants the share of values to keep"),
    (
        "density 0",
        {**TIES, "density": 0},
        "density: ties wants the share of values to keep, above 0",
    ),
    ("density 1.1", {**TIES, "density": 1.1}, "density: Input should be less than or equal to 1"),
    ("a text of density", {"density": "0.5"}, "density: Input should be a valid number"),
    (
        "median",
        {**TIES, "majority_sign_method": "median"},
        "majority_sign_method: Input should be 'tot",
    ),
    ("a misspelled field", {"densty": 0.5}, "densty: no such field"),
]


def job(merged: dict[str, Any], **fields: Any) -> Job:
    given = {"ids": ["sql", "acme/xml"], **merged}
    return Job.parse({"prompt": "hi", "merged_adapters": given, **fields})


def merge_of(**fields: Any) -> MergedAdapters:
    made = job(fields).merged_adapters
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("fields", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_a_bad_merge_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        job(fields)
    assert str(caught.value).startswith(f"job: merged_adapters.{message}")
    assert len(str(caught.value)) < 400


def test_an_adapter_and_a_merge_are_refused() -> None:
    with pytest.raises(InvalidJob, match=r"not both \(adapter_id 'c', .*ids sql, acme/xml\)"):
        job({}, adapter_id="c")


def test_the_name_of_a_merge_is_nobodys_adapter_id() -> None:
    with pytest.raises(InvalidJob, match=r"owner 'merged' stands for merges.* \(got 'merged/0"):
        Job.parse({"prompt": "hi", "adapter_id": "merged/0123456789ab"})
    assert Job.parse({"prompt": "hi", "adapter_id": "merged"}).adapter_name == "merged"


def test_what_is_not_given_is_as_in_lorax() -> None:
    plain = merge_of()
    assert (plain.weights, plain.merge_strategy) == ((1.0, 1.0), "linear")
    assert (plain.density, plain.majority_sign_method) == (None, None)
    nothing = dict.fromkeys(("weights", "merge_strategy", "density", "majority_sign_method"))
    assert merge_of(**nothing) == plain
    assert merge_of(**TIES).majority_sign_method == "total"
    # LoRAX's own client cannot leave the density out.
    assert merge_of(density=0.0, majority_sign_method="frequency") == plain
    dare = merge_of(merge_strategy="dare_linear", density=1, majority_sign_method="total")
    assert (dare.density, dare.majority_sign_method) == (1.0, None)


def test_the_name_follows_from_what_decides() -> None:
    name = merge_of().name
    assert name == "merged/3f019095c0f6"  # written to ledgers: it must stay
    assert re.fullmatch(ADAPTER_PATTERN, name)
    assert merge_of(weights=[1, 1], density=0.3).name == name
    assert json.loads(merge_of(**TIES).canonical) == {
        "ids": ["sql", "acme/xml"],
        "weights": [1.0, 1.0],
        "merge_strategy": "ties",
        "density": 0.5,
        "majority_sign_method": "total",
    }
    others: list[dict[str, Any]] = [
        {"ids": ["acme/xml", "sql"]},
        {"weights": [1, 2]},
        {"weights": [1, -1]},
        TIES,
        TIES | {"density": 0.4},
        TIES | {"majority_sign_method": "frequency"},
        TIES | {"merge_strategy": "dare_ties"},
        TIES | {"merge_strategy": "dare_linear"},
    ]
    assert len({merge_of(**fields).name for fields in others} | {name}) == 9


def test_the_hash_covers_the_merge() -> None:
    hashes = [job(fields).request_hash() for fields in ({}, TIES, {"weights": [2, 1]})]
    bare = Job.parse({"prompt": "hi"})
    assert len({*hashes, bare.request_hash()}) == 4
    assert job({"weights": [1, 1]}).request_hash() == hashes[0]
    assert "merged_adapters" not in bare.body()


def test_routing_knows_a_merge_by_its_name() -> None:
    merged = job(TIES)
    assert merged.adapter_id is None
    assert merged.merged_adapters is not None
    assert merged.adapter_name == merged.merged_adapters.name
    assert Job.parse({"prompt": "hi", "adapter_id": "sql"}).adapter_name == "sql"
    assert Job.parse({"prompt": "hi"}).adapter_name is None
    assert Job.model_validate_json(merged.model_dump_json()) == merged


def test_the_ledger_keeps_a_merge(ledger: Ledger) -> None:
    sent = job({**TIES, "weights": [0.1, -3]}, idempotency_key="k")
    ledger.accept([sent])
    with ledger.engine.connect() as connection:
        assert [row.adapter_id for row in connection.execute(jobs.select())] == [sent.adapter_name]
    assert ledger.claim([sent.job_id], "me", 30)[sent.job_id].job == sent
    with pytest.raises(IdempotencyConflict):
        ledger.accept([job({**TIES, "weights": [0.1, 3]}, idempotency_key="k")])
