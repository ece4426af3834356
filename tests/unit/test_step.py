"""A step's tensors: where each token's keys go, which blocks decode reads, what is sampled."""

from __future__ import annotations

import pytest
import torch

from lorabatch import Job
from lorabatch_kernels import native
from lorabatch_worker.scheduler import Chunk
from lorabatch_worker.sequence import Sequence
from lorabatch_worker.step import StepContext, build_step
from tests.models import claim, generate, runner_of, tiny_config, tiny_model

CPU = torch.device("cpu")


def sequence(prompt: int, output: int, blocks: list[int], slot: int = -1) -> Sequence:
    made = Sequence(claim(Job(prompt="-")), list(range(100, 100 + prompt)), None, blocks=blocks)
    made.output = list(range(500, 500 + output))
    made.slot = slot
    return made


def test_decode_and_prefill_in_one_flat_batch() -> None:
    chunks = [
        Chunk(sequence(3, 2, [7, 2], slot=1), 4, 5),
        Chunk(sequence(1, 0, [5]), 0, 1),
        Chunk(sequence(9, 0, [3, 1, 6], slot=0), 3, 6),
        Chunk(sequence(2, 0, [4]), 0, 2),
    ]
    step = build_step(chunks, 4, CPU)
    assert step.tokens == 7
    assert step.input_ids.tolist() == [501, 100, 103, 104, 105, 100, 101]
    assert step.position_ids.tolist() == [4, 0, 3, 4, 5, 0, 1]
    assert step.kv_index.tolist() == [8, 20, 15, 4, 5, 16, 17]
    assert step.spans == ()
    assert step.paged is not None
    assert step.paged.starts.tolist() == [0, 1, 2, 5, 7]
    assert step.paged.lengths.tolist() == [5, 1, 6, 2]
    assert step.paged.blocks.tolist() == [[7, 2], [5, 0], [3, 1], [4, 0]]
    assert step.paged.longest_run == 3
    assert step.sample_index.tolist() == [0, 1, 6]
    assert step.step_map.active == (0, 1)


def test_a_chunk_that_ends_before_the_prompt_does_samples_nothing() -> None:
    step = build_step([Chunk(sequence(8, 0, [1, 2]), 0, 4)], 4, CPU)
    assert step.sample_index.tolist() == []


def test_runs_of_rows_say_where_each_row_begins() -> None:
    chunks = [
        Chunk(sequence(3, 2, [6, 7]), 4, 5),
        Chunk(sequence(9, 0, [3, 4, 5], slot=0), 3, 6),
    ]
    step = build_step(chunks, 4, CPU, rows=True)
    assert step.paged is None
    assert [(s.start, s.end, s.past, s.length, s.first) for s in step.spans] == [
        (0, 1, 4, 5, 24),
        (1, 4, 3, 6, 12),
    ]
    assert step.kv_index.tolist() == [28, 15, 16, 17]


def test_a_layer_outside_of_a_step_is_a_bug_that_shows() -> None:
    with pytest.raises(AssertionError, match="outside of a step"):
        _ = StepContext().step


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)


BOTH_WAYS = pytest.mark.parametrize("kernels", ["C", "torch"], indirect=True)


@pytest.mark.parametrize("rows", [True, False])
def test_blocks_of_a_job_that_made_nan_are_clean_for_the_next(rows: bool) -> None:
    """An adapter with huge weights gives NaN for its own job, and for nobody else's."""
    runner = runner_of(tiny_model(tiny_config("llama")), rows=rows)
    clean = generate(runner, [[5, 6, 7]], [-1], 6, 9)
    for site in runner.sites.values():
        one = torch.full((1, site.in_features), 1e30)
        site.load(0, one, torch.full((site.out_features, 1), 1e30), 1.0)
    mixed = generate(runner, [[5] * 40, [5, 6, 7]], [0, -1], 6, 99)
    assert torch.isnan(mixed[0]).all()
    torch.testing.assert_close(mixed[1], clean[0])
    torch.testing.assert_close(generate(runner, [[5, 6, 7]], [-1], 6, 9), clean)


@BOTH_WAYS
@pytest.mark.usefixtures("kernels")
def test_attention_over_rows_equals_attention_over_pages() -> None:
    """Sequences of very different lengths, some of them ended, decode in a batch."""
    prompts = [[i + 3] * n for i, n in enumerate((5, 9, 200, 3, 8, 20))]
    found = []
    for rows in (True, False):
        runner = runner_of(tiny_model(tiny_config("llama")), rows=rows)
        found.append(generate(runner, prompts, [-1] * 6, 5, 800))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4)


@BOTH_WAYS
@pytest.mark.usefixtures("kernels")
def test_what_other_jobs_left_in_a_row_is_not_seen() -> None:
    runner = runner_of(tiny_model(tiny_config("llama")), rows=True)
    prompts = [[5, 6, 7], [8] * 20, [9]]
    clean = generate(runner, prompts, [-1] * 3, 5, 9)
    runner.blocks.take_changes()
    with torch.inference_mode():
        for pools in runner.cache._pools.values():
            for pool in pools:
                pool.blocks.fill_(float("nan"))
    torch.testing.assert_close(generate(runner, prompts, [-1] * 3, 5, 9), clean)
