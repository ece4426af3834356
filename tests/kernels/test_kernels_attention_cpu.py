"""Attention over cache rows against the loop over tokens, heads and positions."""

from __future__ import annotations

import math

import pytest
import torch
from lora_cases import assert_close, same_bits

from lorabatch_kernels import RowSpans, attend_reference, attend_rows, can_attend, native

POSITIONS = 900
# (start, count, past, first)
DECODE = [(0, 1, 0, 0), (1, 1, 16, 100), (2, 1, 63, 200), (3, 1, 64, 300), (4, 1, 130, 500)]
MIXED = [*DECODE[:3], (3, 2, 0, 300), (5, 70, 3, 400), (75, 33, 100, 600)]
# Largest relative error: rounding of inputs is shared, so only sums and the output's own rounding.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


class Case:
    """New tokens, and pools full of NaN wherever no sequence has written."""

    def __init__(self, spans, dtype, heads=6, kv_heads=2, width=32, value_width=None):
        draw = torch.Generator().manual_seed(3)
        value_width = value_width or width
        self.spans, self.dtype = spans, dtype
        tokens = sum(count for _, count, _, _ in spans)

        def fresh(*shape):
            return torch.randn(shape, generator=draw).to(dtype)

        # As a model has them: views of [tokens, heads * width].
        self.query = fresh(tokens, heads, width).transpose(0, 1)
        self.key = fresh(tokens, kv_heads, width).transpose(0, 1)
        self.value = fresh(tokens, kv_heads, value_width).transpose(0, 1)
        self.keys = torch.full((kv_heads, POSITIONS, width), math.nan).to(dtype)
        self.values = torch.full((kv_heads, POSITIONS, value_width), math.nan).to(dtype)
        index = []
        for _, count, past, first in spans:
            self.keys[:, first : first + past] = fresh(kv_heads, past, width)
            self.values[:, first : first + past] = fresh(kv_heads, past, value_width)
            index += range(first + past, first + past + count)
        self.index = torch.tensor(index)

    def run(self, **kind):
        heads, tokens, width = self.query.shape
        assert can_attend(self.query, self.key, self.value)
        out = torch.full((tokens, heads, self.value.shape[-1]), math.nan).to(self.dtype)
        new = (self.query, self.key, self.value)
        pools = (self.keys, self.values)
        spans = RowSpans.of(self.spans)
        attend_rows(out, *new, *pools, self.index, spans, width**-0.5, **kind)
        return out

    def wanted(self, **kind):
        scale = self.query.shape[-1] ** -0.5
        pools = (self.keys, self.values)
        parts = [attend_reference(self.query, *pools, s, scale, **kind) for s in self.spans]
        return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes",
    [
        (6, 2, 32),
        (4, 4, 64),
        (9, 1, 16),
        (9, 3, 64),
        (8, 2, 128),
        (2, 1, 80, 96),
        (2, 1, 96, 80),
        (64, 1, 16),
    ],
)
@pytest.mark.parametrize("spans", [DECODE, MIXED], ids=["decode", "mixed"])
def test_against_reference(spans, sizes, dtype):
    case = Case(spans, dtype, *sizes)
    out = case.run()
    assert torch.equal(case.keys[:, case.index], case.key)
    assert torch.equal(case.values[:, case.index], case.value)
    assert_close("out", case.wanted(), out.float(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind",
    [
        {"window": 1},
        {"window": 20},
        {"window": 64},
        {"window": 2000},
        {"softcap": 2.0},
        {"sinks": 1},
    ],
    ids=str,
)
def test_windows_softcaps_and_sinks(kind, dtype):
    if "sinks" in kind:
        kind = {"sinks": torch.linspace(-2, 3, 6).to(dtype), "window": 40}
    case = Case(MIXED, dtype)
    out = case.run(**kind)
    assert_close("out", case.wanted(**kind), out.float(), TOLERANCE[dtype])


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e4])
def test_scores_of_any_size(size):
    case = Case(MIXED, torch.float32)
    case.query = case.query * size
    out = case.run()
    assert_close("out", case.wanted(), out, 1e-4 if size > 1e3 else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_spoils_only_its_own_sequence(dtype):
    case = Case(MIXED, dtype)
    clean = case.run()
    broken = Case(MIXED, dtype)
    broken.key[:, 5:75] = math.nan
    broken.value[:, 3] = math.inf
    out = broken.run()
    others = torch.tensor([t < 3 or t >= 75 for t in range(len(out))])
    assert same_bits(out[others], clean[others])
    assert out[5:75].isnan().all()


def test_a_token_gets_the_same_bits_in_any_company():
    case = Case(MIXED, torch.bfloat16)
    together = case.run()
    for number, (start, count, past, first) in enumerate(MIXED):
        alone = Case(MIXED, torch.bfloat16)
        own = slice(start, start + count)
        alone.query, alone.key = alone.query[:, own], alone.key[:, own]
        alone.value, alone.index = alone.value[:, own], alone.index[own]
        alone.spans = [(0, count, past, first)]
        assert same_bits(alone.run(), together[own]), f"span {number}"


@pytest.mark.parametrize(
    ("fits", "query", "key", "value"),
    [
        (True, (4, 32), (2, 32), (2, 32)),
        (True, (4, 32), (2, 32), (2, 48)),
        (False, (4, 32), (2, 32), (2, 40)),
        (False, (4, 24), (2, 24), (2, 32)),
        (False, (4, 512), (2, 512), (2, 32)),
        (False, (4, 32), (2, 64), (2, 64)),
        (False, (100, 32), (1, 32), (1, 32)),
    ],
)
def test_sizes_that_the_kernel_takes(fits, query, key, value):
    new = [torch.zeros(heads, 3, width) for heads, width in (query, key, value)]
    assert can_attend(*new) is fits
    assert can_attend(*(x.bfloat16() for x in new)) is fits
    assert not can_attend(*(x.half() for x in new))
    assert not can_attend(new[0], new[1], new[2].bfloat16())
    assert not can_attend(*(x.to("meta") for x in new))


def test_why_there_are_no_kernels_is_said(monkeypatch, tmp_path):
    assert native.problem() is None
    for name, value, why in (
        ("LORABATCH_NATIVE", "0", "LORABATCH_NATIVE is 0"),
        ("CC", "no-such-compiler", "no C compiler 'no-such-compiler' on PATH"),
        ("CC", "false", "the C compiler failed: exit status 1"),
        ("CC", 'gcc "-O2', "No closing quotation"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            patch.setenv("XDG_CACHE_HOME", str(tmp_path))
            library, problem = native._loaded.__wrapped__()
        assert library is None
        assert why in problem
    assert not list((tmp_path / "lorabatch").glob("*"))
