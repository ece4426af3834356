"""The Triton kernels in triton's interpreter, on the CPU, against their torch references.

Not collected by name: test_kernels_triton.py runs this file in a process with TRITON_INTERPRET=1.
fp16 and fp32 only: triton 3.6 and 3.9 interpret a bf16 dot as one of raw bits. A live program costs
some 6 ms, so the shapes are small and odd.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from lora_cases import (
    TOLERANCE,
    Shape,
    alone,
    assert_close,
    poison_the_rest,
    rows_of_base,
    same_bits,
    tiles_of,
)

from bench import tune
from lorabatch_kernels import add_lora_reference, buffer_ints, tile_bound
from lorabatch_kernels.expand import expand, expand_reference
from lorabatch_kernels.lora_triton import Shrinking
from lorabatch_kernels.plan import Plan, attention_plan, plan_for
from lorabatch_kernels.shrink import new_planes, shrink, shrink_reference

NAN = float("nan")
DTYPES = [torch.float16, torch.float32]
MIXED = Shape([0, 1, -1, 2, 0, 0, 1, -1, 3, 2], {0: 1, 1: 3, 2: 40, 3: 16}, max_rank=40)
CASES = {
    "mixed ranks, odd sizes": MIXED,
    "more tokens than a tile": replace(MIXED, slots=[1] * 19 + [-1, 0] * 2),
    "gains and shifts": replace(
        MIXED, slots=[*MIXED.slots, 5], ranks={**MIXED.ranks, 5: 0}, affine=(1, 2, 5)
    ),
    "an empty slot": replace(MIXED, slots=[4, 2, 4, -1]),
    "one token": replace(MIXED, slots=[2]),
    "even sizes": Shape([0, 1] * 3, {0: 8, 1: 16}, in_features=128, out_features=128, max_rank=16),
}
SMALL = Plan(
    block_m=16,
    block_k=16,
    block_n=32,
    block_r=16,
    split_k=1,
    num_warps=4,
    shrink_stages=1,
)


def written(shape: Shape) -> torch.Tensor:
    cells = torch.zeros(len(shape.slots), shape.max_rank, dtype=torch.bool)
    for token, slot in enumerate(shape.slots):
        cells[token, : shape.ranks.get(slot, 0)] = True
    return cells


def test_this_is_the_interpreter():
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split_k", [1, 3, 8])
@pytest.mark.parametrize("name", CASES)
def test_shrink(name, split_k, dtype):
    shape = CASES[name]
    site = poison_the_rest(shape.site(dtype, paneled=False))
    x, _ = shape.x_y(dtype)
    plan = replace(SMALL, split_k=split_k)
    planes = new_planes(x, alone(site), plan).fill_(NAN)
    tiles = tiles_of(shape.slots, max_tiles=len(shape.slots) + 2)
    shrink(planes, x, alone(site), tiles, plan)
    cells = written(shape)
    assert planes[:, ~cells].isnan().all(), "a cell without an adapter was written"
    ref = shrink_reference(x, site, shape.slots)
    assert_close("v", ref[cells], planes.sum(0)[cells], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split_k", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_expand(name, split_k, dtype):
    shape = CASES[name]
    site = poison_the_rest(shape.site(dtype, paneled=False))
    _, y = shape.x_y(dtype)
    cells = written(shape)
    planes = torch.randn(split_k, *cells.shape, generator=torch.Generator().manual_seed(2))
    planes[:, ~cells] = NAN
    v = torch.where(cells, planes.sum(0), 0.0)
    ref = expand_reference(y, v, site, shape.slots)
    wide = torch.full((len(shape.slots), y.shape[1] + 9), 7.0, dtype=dtype)
    out = wide[:, 4:-5]
    out.copy_(y)
    expand(out, planes, alone(site), tiles_of(shape.slots), replace(SMALL, split_k=split_k))
    assert_close("y", ref, out, TOLERANCE[dtype])
    base = rows_of_base(shape.slots)
    assert same_bits(out[base], y[base])
    assert wide[:, :4].eq(7).all()
    assert wide[:, -5:].eq(7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [16, 32])
def test_the_whole_with_its_own_plan(dtype, tile):
    shape = replace(MIXED, in_features=2100, slots=[*MIXED.slots, *[1] * 20])
    assert plan_for(shape.in_features, shape.out_features, shape.max_rank, 16, dtype).split_k > 1
    site = poison_the_rest(shape.site(dtype, paneled=False))
    x, y = shape.x_y(dtype)
    ref = add_lora_reference(y, x, site, shape.slots)
    out = y.clone()
    Shrinking(x, alone(site), tiles_of(shape.slots, tile)).add_to(out)
    assert_close("y", ref, out, TOLERANCE[dtype])
    base = rows_of_base(shape.slots)
    assert same_bits(out[base], y[base])


def test_one_buffer_serves_step_after_step():
    site = MIXED.site(torch.float32, paneled=False)
    tokens, max_tiles = 6, tile_bound(6, 4, 16)
    buffer = torch.zeros(buffer_ints(tokens, max_tiles), dtype=torch.int32)
    for slots in ([0, 1, 2, 3, -1, -1], [2, 2, 2, 2, 2, -1], [-1] * 6):
        x, y = replace(MIXED, slots=slots).x_y(torch.float32)
        ref = add_lora_reference(y, x, site, slots)
        tiles = tiles_of(slots, max_tiles=max_tiles, buffer=buffer)
        Shrinking(x, alone(site), tiles).add_to(y)
        assert_close(f"y of {slots}", ref, y, TOLERANCE[torch.float32])


@pytest.fixture
def small_tuning(monkeypatch):
    small = {"DEVICE": "cpu", "LAYERS": 1, "ADAPTERS": 2, "CONTEXT": 32, "TOKENS": {16: 4}}
    for name, value in small.items():
        monkeypatch.setattr(tune, name, value)


@pytest.mark.usefixtures("small_tuning")
@pytest.mark.parametrize("rows", [16, 64])
def test_what_tuning_measures(rows):
    for what, outs in {"sum": [20], "gate": [20, 20], "rotate": [20, 10, 10]}.items():
        run = tune.lora_run(70, outs, 8, 16, torch.float32, what, 10)
        plan = plan_for(70, sum(outs), 8, 16, torch.float32)
        apart, fused = (run(replace(plan, fused=fused)) for fused in (False, True))
        assert apart.shape == (4, 20 if what == "gate" else sum(outs))
        assert_close(what, apart, fused, 1e-6)
    sizes = {"heads": 2, "kv_heads": 1, "width": 16}
    plan = attention_plan(16, 16, rows, torch.float16)
    made = tune.attention_run(sizes, rows, torch.float16)(plan)
    assert made.shape == (64, 2, 16)
    assert made.isfinite().all()
    assert made.any()
