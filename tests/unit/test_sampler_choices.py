"""Biases, typical sampling and log probabilities against transformers and torch."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper

from lorabatch import Job
from lorabatch_worker import sampler
from lorabatch_worker.choices import TokenTexts
from lorabatch_worker.sampler import UNSOUND, Draw, sample, uniform
from lorabatch_worker.scores import LEAST
from lorabatch_worker.sequence import Family
from lorabatch_worker.sequence import Sequence as Running
from tests.models import claim
from tests.unit.test_sampler import VOCABULARY, distinct, invert, quick, running

SCORED = {"logprobs": True, "top_logprobs": 3}


@quick
@given(
    logits=distinct,
    mass=st.sampled_from([0.05, 0.2, 0.5, 0.9, 0.99]),
    temperature=st.sampled_from([0.4, 1.0, 1.7]),
    top_p=st.sampled_from([0.6, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**63 - 1),
)
def test_typical_sampling_is_that_of_transformers(
    logits: list[float], mass: float, temperature: float, top_p: float, min_p: float, seed: int
) -> None:
    ids: Any = None
    scores = torch.tensor([logits], dtype=torch.float64) / temperature
    for warper in (TopPLogitsWarper(top_p), MinPLogitsWarper(min_p), TypicalLogitsWarper(mass)):
        scores = warper(ids, scores)
    p = scores.softmax(dim=-1)[0].tolist()
    row = running(seed, temperature=temperature, typical_p=mass, top_p=top_p, min_p=min_p)
    wanted = {token: value for token, value in enumerate(p) if value > 0}
    assert sample(torch.tensor([logits]), [row]) == [invert(wanted, uniform(seed, 0))]


@quick
@given(
    logits=distinct,
    biases=st.dictionaries(
        st.integers(0, VOCABULARY - 1), st.sampled_from([-100.0, -1.03, 0.52, 3.01]), max_size=5
    ),
)
def test_biases_are_added_before_penalties(logits: list[float], biases: dict[int, float]) -> None:
    row = running(prompt=[3, 4], logit_bias=biases, repetition_penalty=1.3)
    wanted = [value + biases.get(token, 0.0) for token, value in enumerate(logits)]
    for seen in (3, 4):
        wanted[seen] *= 1 / 1.3 if wanted[seen] > 0 else 1.3
    best = max(wanted)
    (token,) = sample(torch.tensor([logits]), [row])
    assert wanted[token] == pytest.approx(best, abs=1e-5)


@quick
@given(logits=distinct, top=st.integers(0, VOCABULARY), seed=st.integers(0, 99))
def test_scores_are_torchs_log_softmax_of_the_models_logits(
    logits: list[float], top: int, seed: int
) -> None:
    """Among rows that want none, and others."""
    params = {"temperature": 1.5, "logit_bias": {"2": 4.0}, "presence_penalty": 1.0, "top_p": 0.9}
    row = running(seed, output=[1], logprobs=True, top_logprobs=top, **params)
    rows = [running(1), row, running(2, temperature=1.0), running(3, **SCORED)]
    draw = Draw(torch.tensor([logits] * 4), rows)
    tokens = draw.wait()
    assert set(draw.scores) == {1, 3}
    wanted = torch.log_softmax(torch.tensor(logits), dim=-1)
    for place, count in ((1, top), (3, 3)):
        scored = draw.scores[place]
        assert scored.logprob == pytest.approx(wanted[tokens[place]].item(), abs=1e-6)
        assert [token for token, _ in scored.top] == wanted.argsort(descending=True)[
            :count
        ].tolist()
        values = [value for _, value in scored.top]
        assert values == pytest.approx(wanted.sort(descending=True).values[:count].tolist())


def test_tokens_that_other_adapters_add_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 50.0]] * 2)
    base, wide = running(1, **SCORED), running(2, **SCORED)
    monkeypatch.setattr(
        Running, "vocabulary", property(lambda self: 4 if self is wide else None), raising=True
    )
    draw = Draw(logits.clone(), [base, wide], vocabulary=3)
    assert draw.wait() == [2, 3]
    wanted = torch.log_softmax(logits[0, :3], dim=-1)
    assert draw.scores[0].logprob == pytest.approx(wanted[2].item(), abs=1e-6)
    assert [token for token, _ in draw.scores[0].top] == [2, 1, 0]
    assert draw.scores[1].top[0] == (3, pytest.approx(0.0, abs=1e-6))


def test_unsound_logits_and_impossible_tokens_have_scores_too() -> None:
    """Which JSON can say."""
    logits = torch.tensor([[torch.nan, 0.0, 1.0], [0.0, -torch.inf, -torch.inf], [1.0, 0.0, 0.0]])
    draw = Draw(logits, [running(s, **SCORED) for s in range(3)])
    assert draw.wait() == [UNSOUND, 0, 0]
    assert draw.scores[1] == (0.0, ((0, 0.0), *draw.scores[1].top[1:]))
    assert {value for _, value in draw.scores[1].top[1:]} == {LEAST}
    json.dumps(draw.scores[1], allow_nan=False)


def test_rows_that_ask_for_no_scores_cost_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(*_: Any) -> None:
        raise AssertionError("nobody asked")

    monkeypatch.setattr(sampler, "Scores", scores)
    draw = Draw(torch.zeros(2, 5), [running(1), running(2, temperature=1.0, n=3)])
    assert len(draw.wait()) == 2
    assert draw.scores == {}
    with pytest.raises(AssertionError, match="nobody asked"):
        Draw(torch.zeros(1, 5), [running(1, temperature=1.0, best_of=2)])


def test_sequences_of_a_family_draw_by_seeds_of_their_own() -> None:
    job = Job(job_id="j", prompt="-", sampling_params={"temperature": 1.0, "n": 8, "seed": 5})
    family = Family.of(8, lambda: Running(claim(job), [0], None))
    drawn = sample(torch.zeros(8, 100_000), family.members)
    assert len(set(drawn)) == 8
    assert drawn[0] == sample(torch.zeros(1, 100_000), [running(5, temperature=1.0)])[0]
    assert [one.key for one in family.members[:3]] == ["j", "j#1", "j#2"]


@pytest.mark.parametrize(
    "text", ["Hello, world", "naïve 日本 🙂", "tabs\tand\nlines", " two  spaces"]
)
def test_bytes_of_tokens_make_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    told = [TokenTexts(tokenizer).told(i) for i in ids]
    raw = [bytes(t["utf8"]) if t["utf8"] is not None else t["text"].encode() for t in told]
    assert b"".join(raw).decode() == text
    assert all("\ufffd" in t["text"] for t in told if t["utf8"] is not None)


def test_special_tokens_are_told_as_such(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    told = TokenTexts(tokenizer).told(end)
    assert (told["text"], told["special"], told["utf8"]) == (tokenizer.eos_token, True, None)
    assert TokenTexts(tokenizer).told(10**6)["text"] == ""


def test_tokens_of_sentencepiece_with_bytes() -> None:
    class Pieces:
        """As Llama 2's: no byte-level letters, bytes as <0x..>."""

        added_tokens_decoder: ClassVar[dict[int, Any]] = {}
        backend_tokenizer = None

        def convert_ids_to_tokens(self, token_id: int) -> str:
            return ["\u2581Hi", "<0xF0>", "<0x0A>", "é"][token_id]

    told = [TokenTexts(Pieces()).told(i) for i in range(4)]
    assert [t["text"] for t in told] == [" Hi", "\ufffd", "\n", "é"]
    assert [t["utf8"] for t in told] == [None, (0xF0,), None, None]
