"""The sampler against slow references, one rule at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from lorabatch import Job
from lorabatch_worker.sampler import UNSOUND, Draw, sample, uniform
from lorabatch_worker.sequence import Sequence as Running
from tests.models import claim

VOCABULARY = 12
quick = settings(max_examples=80, deadline=None)


def running(
    seed: int = 0, prompt: Sequence[int] = (0,), output: Sequence[int] = (), **params: Any
) -> Running:
    job = Job(job_id=f"j{seed}", prompt="-", sampling_params={"seed": seed, **params})
    return Running(claim(job), list(prompt), None, output=list(output))


def kept(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> dict[int, float]:
    """Probabilities of what may be drawn, by the definition of each rule."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if 0 < top_k < len(order):
        order = order[:top_k]
    highest = max(logits)
    weights = {i: math.exp((logits[i] - highest) / temperature) for i in order}
    total = sum(weights.values())
    chosen: dict[int, float] = {}
    mass = 0.0
    for i in order:
        if chosen and (mass >= top_p or weights[i] < min_p * weights[order[0]]):
            break
        chosen[i] = weights[i]
        mass += weights[i] / total
    total = sum(chosen.values())
    return {i: w / total for i, w in chosen.items()}


def invert(probabilities: dict[int, float], u: float) -> int:
    """The token at which the distribution function, by token id, passes u."""
    reached = 0.0
    for token, p in sorted(probabilities.items()):
        reached += p
        if u < reached:
            return token
    return max(probabilities)


# Logits that differ by at least 0.05, so that rounding decides nothing.
distinct = st.lists(
    st.integers(-60, 60), min_size=VOCABULARY, max_size=VOCABULARY, unique=True
).map(lambda values: [v / 20 for v in values])


@quick
@given(logits=distinct)
def test_temperature_zero_takes_the_most_likely_token(logits: list[float]) -> None:
    row = running(temperature=0.0, top_k=3, top_p=0.2, seed=7)
    assert sample(torch.tensor([logits]), [row]) == [logits.index(max(logits))]


@quick
@given(
    logits=distinct,
    temperature=st.sampled_from([0.2, 0.7, 1.0, 2.5]),
    top_k=st.integers(0, VOCABULARY + 3),
    top_p=st.sampled_from([0.05, 0.31, 0.77, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.03, 0.2, 0.9, 1.0]),
    seed=st.integers(0, 2**63 - 1),
)
def test_filters_and_draw_match_the_plain_definition(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    row = running(seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    wanted = kept(logits, temperature, top_k, top_p, min_p)
    assert sample(torch.tensor([logits]), [row]) == [invert(wanted, uniform(seed, 0))]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.2, "top_k": 9},
    ],
)
def test_frequencies_fit_the_distribution(params: dict[str, Any]) -> None:
    logits = [1.5, 0.1, -0.4, 0.9, 1.2, -2.0, 0.35, 0.6, -1.1, 0.2, 1.0, -0.7]
    wanted = kept(
        logits,
        params["temperature"],
        params.get("top_k", 0),
        params.get("top_p", 1.0),
        params.get("min_p", 0.0),
    )
    draws = 4000
    rows = [running(seed, **params) for seed in range(draws)]
    seen = Counter(sample(torch.tensor([logits]).repeat(draws, 1), rows))
    assert set(seen) <= set(wanted)
    chi_square = sum((seen[t] - draws * p) ** 2 / (draws * p) for t, p in wanted.items())
    free = len(wanted) - 1
    assert chi_square < free + 4 * math.sqrt(2 * free)  # about one in ten thousand


def test_successive_positions_of_one_seed_are_independent() -> None:
    rows = [running(5, output=[0] * n, temperature=1.0) for n in range(2000)]
    seen = Counter(sample(torch.zeros(2000, 4), rows))
    assert sum((seen[t] - 500) ** 2 / 500 for t in range(4)) < 3 + 4 * math.sqrt(6)


@quick
@given(
    logits=distinct,
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
    output=st.lists(st.integers(0, VOCABULARY - 1), max_size=6),
    penalty=st.sampled_from([0.5, 0.9, 1.2, 3.0]),
)
def test_repetition_penalty_is_that_of_transformers(
    logits: list[float], prompt: list[int], output: list[int], penalty: float
) -> None:
    row = running(prompt=prompt, output=output, repetition_penalty=penalty)
    rule = RepetitionPenaltyLogitsProcessor(penalty)
    wanted = rule(torch.tensor([[*prompt, *output]]), torch.tensor([logits]))
    assert sample(torch.tensor([logits]), [row]) == [int(wanted.argmax())]


@quick
@given(
    logits=distinct,
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
    output=st.lists(st.integers(0, VOCABULARY - 1), max_size=8),
    frequency=st.sampled_from([-1.3, 0.0, 0.42, 2.0]),
    presence=st.sampled_from([-0.77, 0.0, 0.61, 2.0]),
)
def test_frequency_and_presence_penalties_count_the_output_alone(
    logits: list[float], prompt: list[int], output: list[int], frequency: float, presence: float
) -> None:
    row = running(
        prompt=prompt, output=output, frequency_penalty=frequency, presence_penalty=presence
    )
    counts = Counter(output)
    lowered = [v - frequency * counts[i] - presence * (i in counts) for i, v in enumerate(logits)]
    (token,) = sample(torch.tensor([logits]), [row])
    assert lowered[token] == pytest.approx(max(lowered), abs=1e-5)  # two may be equal but for fp32


MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.3, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 2.0, "min_p": 0.3, "repetition_penalty": 1.4},
    {"temperature": 0.9, "top_k": 7, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.1},
]


def mixed_rows() -> list[Running]:
    return [running(i, [i, 3], [i, 5, 5], **params) for i, params in enumerate(MIXED)]


def mixed_logits(step: float | None) -> Tensor:
    """Random rows; with `step`, rounded to it, so that many tokens tie."""
    logits = torch.randn(len(MIXED), 300, generator=torch.Generator().manual_seed(1)) * 2
    return logits if step is None else (logits / step).round() * step


@pytest.mark.parametrize("step", [None, 0.5, 4.0])
def test_a_token_does_not_depend_on_the_other_rows(step: float | None) -> None:
    together = sample(mixed_logits(step), mixed_rows())
    alone = [
        sample(row[None], [r]) for row, r in zip(mixed_logits(step), mixed_rows(), strict=True)
    ]
    backwards = sample(mixed_logits(step).flip(0), mixed_rows()[::-1])
    assert [[t] for t in together] == alone
    assert together == backwards[::-1]


def test_top_k_keeps_all_of_equal_logits_and_top_p_the_lower_ids() -> None:
    logits = torch.zeros(1, 300)
    logits[0, 250:] = 1.0

    def drawn(**params: Any) -> set[int]:
        return {
            sample(logits.clone(), [running(s, temperature=1.0, **params)])[0] for s in range(400)
        }

    assert drawn(top_k=3) == set(range(250, 300))
    assert drawn(top_k=50, top_p=0.05) == {250, 251, 252}


def test_the_same_seed_repeats_and_another_differs() -> None:
    def text(seed: int) -> list[int]:
        row = running(seed, temperature=1.0)
        for _ in range(20):
            row.output += sample(torch.zeros(1, 50), [row])
        return row.output

    assert text(3) == text(3)
    assert text(3) != text(4)


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-39, 1e-45, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[1.0, 30.0, 2.0, -50.0]])
    assert sample(logits, [running(9, temperature=temperature)]) == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_read_as_float32(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.5, 1.25, -1.0]], dtype=dtype)
    rows = [running(s, temperature=1.0) for s in range(30)]
    assert sample(logits.repeat(30, 1), rows) == sample(logits.float().repeat(30, 1), rows)


def test_masked_out_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 8), -torch.inf)
    logits[0, 6] = -3.0
    assert {sample(logits.clone(), [running(s, temperature=5.0)])[0] for s in range(30)} == {6}


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_uniform_lies_in_its_interval(seed: int) -> None:
    drawn = [uniform(seed, position) for position in range(1000)]
    assert 0.0 <= min(drawn) < 0.02
    assert 0.98 < max(drawn) < 1.0


def test_a_draw_marks_rows_that_cannot_be_believed_and_leaves_the_others() -> None:
    wanted = sample(mixed_logits(None), mixed_rows())
    logits = mixed_logits(None)
    logits[1, 3] = float("nan")
    logits[4, 250] = float("inf")
    logits[6] = -torch.inf
    found = Draw(logits, mixed_rows()).wait()
    assert [i for i, token in enumerate(found) if token == UNSOUND] == [1, 4, 6]
    assert [t for t in found if t != UNSOUND] == [wanted[i] for i in (0, 2, 3, 5, 7)]
