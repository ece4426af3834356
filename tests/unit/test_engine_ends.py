"""How jobs on a tiny engine end, and what the engine says of itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from lorabatch_kernels import native
from lorabatch_worker.engine import Engine
from lorabatch_worker.stop import decode
from tests.desk import PROMPTS, Desk, job, start


def test_length(desk: Desk) -> None:
    result = desk.run(job("length", max_new_tokens=5))["length"]
    assert (result.state, result.finish_reason) == ("succeeded", "length")
    assert (len(result.token_ids), result.usage.output_tokens) == (5, 5)
    assert result.usage.prompt_tokens == len(desk.engine.base.tokenizer(PROMPTS[0])["input_ids"])
    assert result.text == decode(desk.engine.base.tokenizer, result.token_ids)
    assert (result.attempt, result.submitted_us, result.started_us) == (1, 1, 2)


def test_end_token_and_ignore_eos(own: Desk) -> None:
    plain = own.run(job("plain"))["plain"]
    end = plain.token_ids[3]
    first = plain.token_ids.index(end)
    own.engine.base = _with_end(own.engine, end)
    results = own.run(job("ends", ignore_eos=False), job("goes-on"))
    assert results["ends"].finish_reason == "eos_token"
    assert results["ends"].token_ids == plain.token_ids[: first + 1]
    assert results["ends"].usage.output_tokens == first + 1
    assert results["goes-on"].finish_reason == "length"
    assert results["goes-on"].token_ids == plain.token_ids


def _with_end(engine: Engine, token: int) -> Any:
    from dataclasses import replace

    return replace(engine.base, eos_ids=frozenset({token}))


def test_stop_string(desk: Desk) -> None:
    plain = desk.run(job("plain-stop", max_new_tokens=20))["plain-stop"]
    assert plain.text is not None
    stop = plain.text[len(plain.text) // 2 :][:4]
    cut = plain.text[: plain.text.index(stop)]
    result = desk.run(job("stops", max_new_tokens=20, stop=["no such text", stop]))["stops"]
    assert (result.finish_reason, result.text) == ("stop_sequence", cut)
    made = result.usage.output_tokens
    assert result.token_ids == plain.token_ids[:made]
    tokenizer = desk.engine.base.tokenizer
    assert stop in decode(tokenizer, plain.token_ids[:made])
    assert stop not in decode(tokenizer, plain.token_ids[: made - 1])


def test_a_job_that_fills_the_context_to_the_last_token(desk: Desk) -> None:
    prompt = desk.engine.base.tokenizer(PROMPTS[1])["input_ids"]
    result = desk.run(job("full", PROMPTS[1], max_new_tokens=256 - len(prompt)))["full"]
    assert (result.state, result.usage.total_tokens) == ("succeeded", 256)


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_cache_tokens": 16, "max_context_tokens": 16},
        {"kv_cache_tokens": 256, "block_size": 256},
        {"max_seqs": 1, "max_step_tokens": 16, "adapter_slots": 1, "max_adapter_rank": 1},
    ],
)
def test_the_smallest_settings_start_and_run(
    fields: dict[str, Any], tiny_folder: Path, home: Path
) -> None:
    desk = start(tiny_folder, home, **fields)
    results = desk.run(*(job(f"j{i}", "a b", max_new_tokens=5) for i in range(3)))
    assert {r.state for r in results.values()} == {"succeeded"}
    assert [c.job.job_id for c in desk.engine.drain(0)] == []


def test_load_and_description_tell_what_runs(
    desk: Desk, tiny_adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = desk.engine.load
    desk.run(job("counted", max_new_tokens=4))
    after = desk.engine.load
    assert after["generated_tokens"] == before["generated_tokens"] + 4
    assert after["steps"] == before["steps"] + 4
    assert (after["waiting"], after["running"]) == (0, 0)
    assert desk.engine.description["adapters"] == sorted(tiny_adapters)
    assert desk.engine.description["kernels"] == "compiled"
    monkeypatch.setattr(native, "problem", lambda: "no compiler")
    assert desk.engine.description["kernels"] == "torch operators, slower: no compiler"
    assert desk.engine.last_progress_s <= time.monotonic()
