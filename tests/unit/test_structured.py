"""Texts that must be like something: all are, in any company, and hostile grammars end alone."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorabatch import Job
from lorabatch.errors import InvalidJob
from lorabatch.structured import StructuredOutputs
from lorabatch_worker.grammar import Grammar, constrain
from lorabatch_worker.grammars import Grammars
from lorabatch_worker.sampler import Draw
from lorabatch_worker.sequence import Sequence
from tests.added_tokens import add_tokens, write_tokenizer
from tests.desk import PROMPTS, WAIT_S, Desk, job, leave_nothing, start
from tests.models import claim, random_adapter, resized

SCHEMAS: dict[str, dict[str, Any]] = {
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "list": {
        "type": "array",
        "items": {"enum": ["red", "green", 3, None]},
        "minItems": 2,
        "maxItems": 4,
    },
    "either": {
        "type": "object",
        "properties": {
            "a": {"anyOf": [{"type": "boolean"}, {"const": "ü€"}]},
            "b": {"type": "string", "pattern": "^[a-z]{2,6}$"},
        },
        "required": ["b", "a"],
        "additionalProperties": False,
    },
}
SAMPLING: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
)
REGEX = r"(yes|no), [0-9]{3}"
CHOICE = ('a "b"\\', "second\nline", "ü")


def wants(job_id: str, adapter: str | None = None, **wanted: Any) -> Job:
    """A job whose text must be like something; other fields are sampling parameters."""
    kinds = ("json", "json_object", "regex", "choice")
    structured = {kind: wanted.pop(kind) for kind in kinds if kind in wanted}
    params = {"max_new_tokens": 100, "ignore_eos": False, "structured_outputs": structured}
    return job(job_id, adapter=adapter, **{**params, **wanted})


def constrained(names: list[str]) -> dict[str, tuple[Job, Any]]:
    """Each schema with every adapter and the base model, sampled in several ways."""
    made = {}
    for n, adapter in enumerate([None, *names]):
        for s, (name, schema) in enumerate(SCHEMAS.items()):
            job_id = f"{name}-{adapter}"
            sampling = SAMPLING[(n + s) % len(SAMPLING)]
            made[job_id] = wants(job_id, adapter, json=schema, **sampling), schema
    return made


def plain(names: list[str]) -> list[Job]:
    return [
        job(f"plain-{name}", PROMPTS[2], name, temperature=0.5 * (n % 2), seed=n)
        for n, name in enumerate(names)
    ]


def test_all_texts_validate_and_neighbours_are_unchanged(
    own: Desk, tiny_adapters: dict[str, Path]
) -> None:
    asked = constrained(list(tiny_adapters))
    others = plain(list(tiny_adapters))
    alone = {i: r.token_ids for i, r in own.run(*others).items()}
    again = [one.model_copy(update={"job_id": f"mixed-{one.job_id}"}) for one in others]
    results = own.run(*(one for one, _ in asked.values()), *again)
    for job_id, (_, schema) in asked.items():
        assert results[job_id].finish_reason == "eos_token", results[job_id]
        jsonschema.validate(json.loads(results[job_id].text or ""), schema)
    assert {i: results[f"mixed-{i}"].token_ids for i in alone} == alone
    assert len({results[i].text for i in asked}) > len(asked) / 2, "they are not all alike"
    leave_nothing(own.engine)


def test_other_kinds(desk: Desk) -> None:
    some: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 12}
    results = desk.run(
        wants("regex", regex=REGEX),
        wants("regex-hot", regex=REGEX, temperature=2.0),
        *(wants(f"choice-{n}", choice=CHOICE, temperature=5.0, seed=n) for n in range(8)),
        wants("object", json_object=True, **some),
    )
    for name in ("regex", "regex-hot"):
        assert re.fullmatch(REGEX, results[name].text or "")
    chosen = {results[f"choice-{n}"].text for n in range(8)}
    assert chosen <= set(CHOICE)
    assert len(chosen) > 1
    assert (results["object"].text or "").startswith("{")


def test_a_constrained_job_gets_the_same_tokens_alone_and_when_it_gives_way(
    tiny_folder: Path, home: Path
) -> None:
    regex = "([a-z]{3} ){50}"  # long enough for a tight cache
    asked = [
        wants(f"r{n}", regex=regex, temperature=1.0, seed=n, max_new_tokens=240) for n in range(6)
    ]
    found = []
    for tokens in (4096, 360):
        desk = start(tiny_folder, home, kv_cache_tokens=tokens)
        results = desk.run(*asked)
        found.append({i: r.token_ids for i, r in results.items()})
        assert all(re.fullmatch(regex, r.text or "") for r in results.values())
        assert (desk.engine.load["preemptions"] > 0) == (tokens == 360)
        assert desk.engine.drain(0) == []
    assert found[0] == found[1]


def test_length_and_stop_strings_cut_it(desk: Desk) -> None:
    long = desk.run(wants("cut", json=SCHEMAS["person"], max_new_tokens=2))["cut"]
    assert (long.finish_reason, len(long.token_ids)) == ("length", 2)
    stopped = desk.run(wants("stopped", regex="a{3}STOPb{3}", stop=["STOP"]))["stopped"]
    assert (stopped.finish_reason, stopped.text) == ("stop_sequence", "aaa")


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
    message = results["keyword"].error
    assert message is not None
    assert (
        message.message
        == "job 'keyword': structured_outputs: Unimplemented keys: [\"uniqueItems\"]"
    )
    leave_nothing(own.engine)


def test_a_grammar_over_its_time_is_remembered(tokenizer: Any) -> None:
    grammars = Grammars(bound_s=0.05, memory_bytes=1 << 30)
    slow = StructuredOutputs(**HOSTILE["slow"])
    for name in ("one", "two"):
        with pytest.raises(InvalidJob, match=f"'{name}': .* not compiled after 0.05 s"):
            grammars.grammar_of(name, slow, tokenizer, frozenset({2}))
    assert grammars._child is None, "the second one was not tried"
    grammars.close()


def test_end_tokens_of_the_adapter_end_it_and_nothing_else_does(tokenizer: Any) -> None:
    grammars = Grammars()
    own = tokenizer("!")["input_ids"][0]
    wanted = StructuredOutputs(regex="a!?b")
    grammar = grammars.grammar_of("j", wanted, tokenizer, frozenset({2, own}))
    (a,), (b,) = (tokenizer(text)["input_ids"] for text in "ab")
    assert allowed(grammar).isdisjoint({2, own})
    grammar.take(a)
    assert b in allowed(grammar)
    assert own not in allowed(grammar), "it would end a text that is not whole"
    grammar.take(b)
    assert allowed(grammar) == {2, own}
    grammar.take(a)
    assert grammar.failed
    with pytest.raises(InvalidJob, match="'j': .* no end token"):
        grammars.grammar_of("j", wanted, tokenizer, frozenset())
    grammars.close()


def allowed(grammar: Grammar) -> set[int]:
    mask = np.zeros(grammar.words, np.uint32)
    grammar.fill(mask)
    return set(np.nonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0].tolist())


class OneToken:
    """Stands in for llguidance's matcher."""

    def __init__(self, token: int) -> None:
        self.token = token

    def unsafe_compute_mask_ptr(self, pointer: int, size: int) -> None:
        words = (ctypes.c_uint32 * (size // 4)).from_address(pointer)
        words[self.token // 32] |= 1 << self.token % 32

    def is_error(self) -> bool:
        return False


class Row:
    def __init__(self, grammar: Grammar | None) -> None:
        self.grammar = grammar


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 70, 96])
def test_only_rows_with_a_grammar_change(width: int, dtype: torch.dtype) -> None:
    """Also where logits are wider than a tokenizer, or it wider than they are."""
    torch.manual_seed(0)
    logits = torch.randn(4, width).to(dtype)
    before = logits.clone()
    rows = [Row(None), Row(grammar_for(5, 2)), Row(None), Row(grammar_for(69, 4))]
    constrain(logits, rows)
    assert torch.equal(logits[0::2], before[0::2])
    assert [i for i, x in enumerate(logits[1].tolist()) if x != -torch.inf] == [5]
    assert logits[1, 5] == before[1, 5]
    wanted = [69] if width > 69 else []
    assert [i for i, x in enumerate(logits[3].tolist()) if x != -torch.inf] == wanted


def grammar_for(token: int, words: int) -> Grammar:
    return Grammar(OneToken(token), words, own_end=0, end_ids=frozenset())


@pytest.fixture(scope="module")
def more(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """An engine with an adapter whose tokens zyes and zno the base does not have."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    tokenizer = add_tokens(AutoTokenizer.from_pretrained(tiny_folder), ["zyes", "zno"])
    folder = tmp_path_factory.mktemp("more") / "adapter"
    fields = {"target_modules": ["q_proj"], "save_embedding": True}
    random_adapter(resized(model, len(tokenizer)), folder, 1, **fields)
    write_tokenizer(folder, tokenizer)
    desk = start(tiny_folder, tmp_path_factory.mktemp("home"), f"more={folder}")
    yield desk
    assert desk.engine.drain(WAIT_S) == []


def test_tokens_that_an_adapter_adds_count(more: Desk) -> None:
    regex = "(zyes|zno){6}"
    asked = [wants(f"more-{n}", "more", regex=regex, temperature=10.0, seed=n) for n in range(4)]
    results = more.run(*asked, wants("base", regex=regex), job("plain"))
    assert all(re.fullmatch(regex, results[one.job_id].text or "") for one in asked)
    assert re.fullmatch(regex, results["base"].text or "")
    most = {name: max(result.token_ids) for name, result in results.items()}
    assert max(most[one.job_id] for one in asked) >= 49152 > most["base"]


def test_a_draw_picks_what_is_allowed(tokenizer: Any) -> None:
    """At temperature 0 and above, with penalties for it."""
    penalties: dict[str, Any] = {"repetition_penalty": 5.0, "presence_penalty": 2.0}
    for params in ({}, penalties, {"temperature": 3.0, "top_k": 3, "min_p": 0.2, **penalties}):
        sequence = Sequence(claim(job("d", **params)), [5], None, grammar=grammar_for(5, 2))
        sequence.output = [5]
        assert Draw(torch.randn(1, 64), [sequence]).wait() == [5]
