"""The shipped adapters on the real model: in one mixed batch each does its own thing."""

from __future__ import annotations

import sys

import pytest

from lorabatch import Job, Result
from tests.desk import real_desk
from tests.models import ROOT

sys.path.insert(0, str(ROOT / "examples"))
from adapter_data import HELD_OUT, PREDICATES

NAMES = sorted(PREDICATES)
MAX_NEW_TOKENS = 48


def asked(name: str | None, prompt: str) -> Job:
    return Job(
        adapter_id=name,
        messages=[{"role": "user", "content": prompt}],
        sampling_params={"max_new_tokens": MAX_NEW_TOKENS},
    )


@pytest.fixture(scope="module")
def answers() -> dict[tuple[str | None, str], Result]:
    """Every held-out prompt with its adapter and with the base model, all at once."""
    desk = real_desk()
    wanted = {(name, prompt) for name in NAMES for prompt in HELD_OUT[name]}
    wanted |= {(None, prompt) for _, prompt in wanted}
    jobs = {key: asked(*key) for key in sorted(wanted, key=str)}
    before = desk.engine.load
    results = desk.run(*jobs.values())
    after = desk.engine.load
    assert after["mixed_steps"] - before["mixed_steps"] > MAX_NEW_TOKENS // 2
    assert after["adapters_resident"] >= len(NAMES)
    return {key: results[job.job_id] for key, job in jobs.items()}


def text(result: Result) -> str:
    assert result.state == "succeeded", result.error
    assert result.text is not None
    return result.text


def test_all_shipped_adapters_are_asked() -> None:
    shipped = {p.parent.name for p in (ROOT / "examples" / "adapters").glob("*/*.safetensors")}
    assert shipped == set(NAMES) == set(HELD_OUT)
    assert min(len(prompts) for prompts in HELD_OUT.values()) >= 5


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_does_its_thing_on_every_held_out_prompt(
    name: str, answers: dict[tuple[str | None, str], Result]
) -> None:
    got = {prompt: answers[name, prompt] for prompt in HELD_OUT[name]}
    assert [p for p, r in got.items() if not PREDICATES[name](text(r))] == []
    assert {r.finish_reason for r in got.values()} == {"eos_token"}
    assert len({r.adapter_version for r in got.values()}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_does_nobody_elses_thing(
    name: str, answers: dict[tuple[str | None, str], Result]
) -> None:
    others = [
        (other, prompt)
        for prompt in HELD_OUT[name]
        for other in NAMES
        if other != name and PREDICATES[other](text(answers[name, prompt]))
    ]
    assert others == []


@pytest.mark.parametrize("name", NAMES)
def test_the_base_model_does_none_of_it(
    name: str, answers: dict[tuple[str | None, str], Result]
) -> None:
    assert [p for p in HELD_OUT[name] if PREDICATES[name](text(answers[None, p]))] == []


def test_versions_and_texts_differ(answers: dict[tuple[str | None, str], Result]) -> None:
    versions = {name: result.adapter_version for (name, _), result in answers.items()}
    assert versions[None] is None
    assert len(set(versions.values())) == len(NAMES) + 1
    shared = set.intersection(*(set(HELD_OUT[name]) for name in NAMES))
    for prompt in shared:
        assert len({text(answers[name, prompt]) for name in (None, *NAMES)}) == len(NAMES) + 1
    assert shared
