"""The same job gets the same tokens in any company, and those of transformers and PEFT."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorabatch import Job
from tests.desk import PROMPTS, Desk, job, leave_nothing, start
from tests.models import load_with_peft

SAMPLING: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.7, "top_k": 50, "seed": 12},
    {"temperature": 1.3, "top_p": 0.8, "repetition_penalty": 1.2, "seed": 13},
)


def mixture(names: list[str]) -> list[Job]:
    """Every prompt with every adapter and the base model, sampled in several ways."""
    return [
        job(f"{p}-{name}", prompt, name, **SAMPLING[(p + n) % len(SAMPLING)])
        for n, name in enumerate([None, *names])
        for p, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def alone(desk: Desk, tiny_adapters: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    """Tokens of each job of the mixture, one at a time."""
    return {
        j.job_id: desk.run(j.model_copy(update={"job_id": f"alone-{j.job_id}"}))[
            f"alone-{j.job_id}"
        ].token_ids
        for j in mixture(list(tiny_adapters))
    }


@pytest.mark.parametrize("order", ["as made", "reversed", "shuffled"])
def test_a_job_gets_the_same_tokens_alone_and_in_a_mixed_batch(
    order: str, own: Desk, alone: dict[str, tuple[int, ...]], tiny_adapters: dict[str, Path]
) -> None:
    jobs = mixture(list(tiny_adapters))
    if order == "reversed":
        jobs.reverse()
    elif order == "shuffled":
        random.Random(5).shuffle(jobs)
    results = own.run(*jobs)
    assert {i: r.token_ids for i, r in results.items()} == alone
    assert own.engine.load["mixed_steps"] > 5
    assert own.engine.load["adapters_resident"] == 3
    leave_nothing(own.engine)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_step_tokens": 16, "max_seqs": 4},
        {"max_step_tokens": 17, "max_seqs": 16, "block_size": 5},
        {"adapter_slots": 1, "max_seqs": 3, "block_size": 1},
        {"adapter_slots": 8, "max_seqs": 32, "kv_cache_tokens": 256, "block_size": 32},
    ],
)
def test_chunks_blocks_and_slots_do_not_change_tokens(
    fields: dict[str, Any],
    tiny_folder: Path,
    configured: str,
    home: Path,
    alone: dict[str, tuple[int, ...]],
    tiny_adapters: dict[str, Path],
) -> None:
    desk = start(tiny_folder, home, configured, **fields)
    results = desk.run(*mixture(list(tiny_adapters)))
    assert {i: r.token_ids for i, r in results.items()} == alone
    leave_nothing(desk.engine)
    assert desk.engine.drain(0) == []


def test_adapters_matter_and_each_one_differs(
    alone: dict[str, tuple[int, ...]], tiny_adapters: dict[str, Path]
) -> None:
    names = [None, *tiny_adapters]
    greedy = {
        name: alone[f"{p}-{name}"] for n, name in enumerate(names) for p in [(-n) % len(SAMPLING)]
    }
    same_prompt = Counter(alone[f"2-{name}"] for name in names)
    assert len(same_prompt) == len(names)
    assert len(greedy) == len(names)


def test_greedy_tokens_are_those_of_transformers_and_peft(
    desk: Desk, tiny_folder: Path, tiny_adapters: dict[str, Path]
) -> None:
    jobs = [job(f"parity-{n}", PROMPTS[2], n) for n in (None, *tiny_adapters)]
    results = desk.run(*jobs)
    for j in jobs:
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
        if j.adapter_id is not None:
            model = load_with_peft(model, tiny_adapters[j.adapter_id])
        ids = desk.engine.base.tokenizer(PROMPTS[2], return_tensors="pt")
        out = model.generate(
            **ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None
        )
        assert out[0, ids["input_ids"].shape[1] :].tolist() == list(results[j.job_id].token_ids)


def test_the_same_seed_repeats_and_another_does_not(desk: Desk) -> None:
    one, same, other = (
        job(f"seed-{i}", temperature=1.0, seed=seed, max_new_tokens=12)
        for i, seed in enumerate((1, 1, 2))
    )
    results = desk.run(one, same, other)
    texts = [results[j.job_id].token_ids for j in (one, same, other)]
    assert texts[0] == texts[1] != texts[2]
    assert [results[j.job_id].seed for j in (one, same, other)] == [1, 1, 2]


def test_the_chat_template_of_the_adapter_is_used(
    own: Desk, home: Path, tiny_adapters: dict[str, Path]
) -> None:

    shutil.copytree(tiny_adapters["all"], home / "adapters" / "own")
    template = "{{ messages[0].content }} ->"
    (home / "adapters" / "own" / "chat_template.jinja").write_text(template)
    params = {"max_new_tokens": 6, "ignore_eos": True}
    talk = [{"role": "user", "content": "Hi there"}]
    chat = {
        n: Job(job_id=n, adapter_id=n, messages=talk, sampling_params=params)
        for n in ("own", "all")
    }
    results = own.run(*chat.values(), job("plain", "Hi there ->", "all", max_new_tokens=6))
    assert results["own"].token_ids == results["plain"].token_ids != results["all"].token_ids
    assert results["own"].adapter_version != results["all"].adapter_version
