"""Texts that must be like something: all are, in any company."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorabatch import Job
from lorabatch.candidates import seed_of
from tests.added_tokens import add_tokens, write_tokenizer
from tests.desk import PROMPTS, WAIT_S, Desk, job, leave_nothing, start
from tests.models import random_adapter, resized
from tests.structured_jobs import REGEX, SCHEMAS, wants

SAMPLING: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
)
CHOICE = ('a "b"\\', "second\nline", "ü", "\x7f")


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


def test_each_of_several_texts_has_a_grammar_of_its_own(desk: Desk) -> None:
    regex = "([a-z]{2}[0-9]){1,5}"
    hot: dict[str, Any] = {"regex": regex, "temperature": 2.0}
    many = desk.run(wants("many", n=3, seed=5, **hot))["many"]
    assert many.choices is not None
    assert len({choice.token_ids for choice in many.choices}) == 3
    for number, choice in enumerate(many.choices):
        assert re.fullmatch(regex, choice.text or ""), choice
        single = desk.run(wants(f"single-{number}", seed=seed_of(5, number), **hot))
        assert single[f"single-{number}"].token_ids == choice.token_ids
    leave_nothing(desk.engine)


def test_length_and_stop_strings_cut_it(desk: Desk) -> None:
    long = desk.run(wants("cut", json=SCHEMAS["person"], max_new_tokens=2))["cut"]
    assert (long.finish_reason, len(long.token_ids)) == ("length", 2)
    stopped = desk.run(wants("stopped", regex="a{3}STOPb{3}", stop=["STOP"]))["stopped"]
    assert (stopped.finish_reason, stopped.text) == ("stop_sequence", "aaa")


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
