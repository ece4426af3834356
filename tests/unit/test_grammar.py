"""What a grammar allows, and that no other token can be drawn."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

from lorabatch.errors import InvalidJob
from lorabatch_worker.grammar import Grammar, constrain
from lorabatch_worker.grammars import Grammars
from lorabatch_worker.sampler import Draw
from lorabatch_worker.sequence import Sequence
from tests.desk import job
from tests.models import claim
from tests.structured_jobs import constraint


def test_end_tokens_of_the_adapter_end_it_and_nothing_else_does(tokenizer: Any) -> None:
    grammars = Grammars()
    own = tokenizer("!")["input_ids"][0]
    wanted = constraint(regex="a!?b")
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


def test_end_tokens_of_one_job_are_not_those_of_the_next(tokenizer: Any) -> None:
    """They have the same tokenizer, and the first one's adapter has end tokens of its own."""
    grammars = Grammars()
    wanted = constraint(regex="a")
    end = tokenizer.eos_token_id
    (a,) = tokenizer("a")["input_ids"]
    for ends in ({0, a, end}, {end}, {a + 1}):
        grammar = grammars.grammar_of("j", wanted, tokenizer, frozenset(ends))
        if a not in ends:
            assert allowed(grammar) == {a}
            grammar.take(a)
            assert allowed(grammar) == ends
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


def test_a_draw_picks_what_is_allowed() -> None:
    """At temperature 0 and above, with penalties for it."""
    penalties: dict[str, Any] = {"repetition_penalty": 5.0, "presence_penalty": 2.0}
    for params in ({}, penalties, {"temperature": 3.0, "top_k": 3, "min_p": 0.2, **penalties}):
        sequence = Sequence(claim(job("d", **params)), [5], None, grammar=grammar_for(5, 2))
        sequence.output = [5]
        assert Draw(torch.randn(1, 64), [sequence]).wait() == [5]


def test_log_probabilities_are_of_what_the_model_said() -> None:
    """Not of what the grammar left: the most likely token may be one that it forbids."""
    torch.manual_seed(1)
    logits = torch.randn(2, 64)
    wanted = logits.log_softmax(dim=-1)
    scored = job("scored", logprobs=True, top_logprobs=3)
    grammars = grammar_for(5, 2), None
    rows = [Sequence(claim(scored), [5], None, grammar=grammar) for grammar in grammars]
    draw = Draw(logits, rows)
    tokens = draw.wait()
    assert tokens[0] == 5 != int(wanted[0].argmax())
    for row, token in enumerate(tokens):
        assert draw.scores[row].logprob == pytest.approx(float(wanted[row, token]))
        values, ids = wanted[row].topk(3)
        assert [i for i, _ in draw.scores[row].top] == ids.tolist()
        assert [p for _, p in draw.scores[row].top] == pytest.approx(values.tolist())
