"""Grammars that take too much, or that nobody can compute, end alone."""

from __future__ import annotations

import random
import re
from copy import copy
from typing import Any

import numpy as np
import pytest

from lorabatch.errors import InvalidJob
from lorabatch_worker import grammars as grammars_module
from lorabatch_worker.grammars import Grammars
from tests.desk import Desk, job, leave_nothing
from tests.structured_jobs import REGEX, constraint, wants


def test_what_gets_too_complex_fails_alone(own: Desk) -> None:
    """Its first token can be found; then there are 4,000 ways to go on."""
    properties = {f"p{i}": {"type": "string"} for i in range(1000)}
    results = own.run(
        wants("complex", json={"type": "object", "properties": properties}),
        wants("sound", regex=REGEX),
        job("plain"),
    )
    assert {i: r.state for i, r in results.items()} == {
        "complex": "failed",
        "sound": "succeeded",
        "plain": "succeeded",
    }
    error = results["complex"].error
    assert error is not None
    assert error.code == "invalid_job"
    assert "too complex" in error.message
    assert results["complex"].usage.output_tokens > 0
    leave_nothing(own.engine)


HOSTILE: dict[str, dict[str, Any]] = {
    "regex": {"regex": "(x{1000}){1000}"},
    "slow": {"json": {"type": "integer", "multipleOf": 1000003}},
    "large": {"json": {"type": "integer", "multipleOf": 200003}},
    "deep": {
        "json": {
            "$ref": "#/$defs/0",
            "$defs": {
                str(i): {"type": "object", "properties": {"a": {"$ref": f"#/$defs/{i + 1}"}}}
                for i in range(3000)
            }
            | {"3000": {}},
        }
    },
    "enums": {
        "json": {
            "type": "object",
            "properties": {
                f"p{i}": {"enum": [f"{i}/{n}" for n in range(10_000)]} for i in range(2)
            },
        }
    },
    "cycle": {
        "json": {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        }
    },
    "keyword": {"json": {"type": "array", "uniqueItems": True}},
    "reference": {"json": {"$ref": "http://example.com/schema.json"}},
    "brackets": {"regex": "(a"},
    "lookahead": {"regex": "(?=a)b"},
}


def test_hostile_ones_fail_alone_while_others_go_on(own: Desk) -> None:
    own.submit(*(wants(name, **kinds) for name, kinds in HOSTILE.items()))
    others = own.run(job("plain"), wants("nested", regex="(a+)+b", max_new_tokens=4))
    assert all(r.state == "succeeded" for r in others.values())
    results = own.wait(HOSTILE)
    codes = {name: result.error and result.error.code for name, result in results.items()}
    assert codes == dict.fromkeys(HOSTILE, "invalid_job")
    assert own.run(wants("after", regex=REGEX))["after"].state == "succeeded"
    whys = {name: result.error.message for name, result in results.items() if result.error}
    assert (
        whys["keyword"]
        == "job 'keyword': structured_outputs: Unimplemented keys: [\"uniqueItems\"]"
    )
    assert re.search("takes [0-9]+ MiB when compiled, allowed 16", whys["large"])
    leave_nothing(own.engine)


def test_a_text_that_gets_too_complex_spoils_no_other_job(tokenizer: Any) -> None:
    """Whose texts are alike."""
    grammars = Grammars()
    wanted = constraint(regex=".*a.{40}")
    draw = random.Random(1)

    def steps() -> int:
        """How far a text of random tokens gets, 450 at most."""
        grammar = grammars.grammar_of("j", wanted, tokenizer, frozenset({2}))
        for made in range(450):
            mask = np.zeros(grammar.words, np.uint32)
            grammar.fill(mask)
            if grammar.failed:
                return made
            mask[0] &= ~np.uint32(1 << 2)  # it goes on
            may_come = np.nonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0]
            grammar.take(int(draw.choice(may_come)))
        return 450

    assert min(steps() for _ in range(4)) > 100
    grammars.close()


def test_the_last_tokenizers_are_kept(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes tens of megabytes, and as many adapters may bring one as there are."""
    monkeypatch.setattr(grammars_module, "TOKENIZERS", 2)
    grammars = Grammars()
    first, second, third = (copy(tokenizer) for _ in range(3))
    for own in (first, second, first, third):
        grammars.grammar_of("j", constraint(regex=REGEX), own, frozenset({2}))
    assert set(grammars._vocabularies) == {first, third}
    grammars.close()


def test_a_grammar_over_its_time_is_remembered(tokenizer: Any) -> None:
    grammars = Grammars(bound_s=0.05, memory_bytes=1 << 30)
    slow = constraint(**HOSTILE["slow"])
    for name in ("one", "two"):
        with pytest.raises(InvalidJob, match=f"'{name}': .* not compiled after 0.05 s"):
            grammars.grammar_of(name, slow, tokenizer, frozenset({2}))
    assert grammars._children.child is None, "the second one was not tried"
    grammars.close()
