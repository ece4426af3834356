"""LoRA of several sites at once, and inside of what reads it next, in triton's interpreter.

Not collected by name: test_kernels_triton.py runs this file in a process with TRITON_INTERPRET=1.
fp16 and fp32 only (see interpreted_kernels.py).
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import row_cases
import torch
from lora_cases import (
    TOLERANCE,
    assert_close,
    group_of,
    group_reference,
    rows_of_base,
    same_bits,
    tiles_of,
)

from lorabatch_kernels import lora_triton
from lorabatch_kernels.expand import expand
from lorabatch_kernels.expand_into import expand_gate, expand_rotary, expand_sum
from lorabatch_kernels.lora_triton import Shrinking
from lorabatch_kernels.plan import plan_for
from lorabatch_kernels.rows_triton import rotary_, silu_gate
from lorabatch_kernels.shrink import new_planes, shrink

NAN = float("nan")
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
RANKS = [{0: 3, 1: 17, 2: 40}, {3: 16, 0: 5}, {0: 8, 3: 1}]
SLOTS = {
    "mixed": [0, 1, -1, 2, 0, 0, 1, -1, 3, 2],
    "more than a tile": [-1] * 17 + [1, 0, 1] + [2] * 18,
    "an empty slot": [4, -1, 4],
}
CASES = pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
IN, WIDTH = 70, 10


def drawn(*shape, dtype, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def shrunk(slots, group, split_k):
    """x, its tiles, a plan, and planes of which nothing else may be read."""
    x, tiles = drawn(len(slots), IN, dtype=group.dtype), tiles_of(slots)
    plan = replace(
        plan_for(IN, group.out_features, 40, 16, group.dtype),
        block_k=16,
        block_n=32,
        split_k=split_k,
    )
    planes = new_planes(x, group, plan).fill_(NAN)
    shrink(planes, x, group, tiles, plan)
    return x, planes, tiles, plan


def inside(y):
    """A copy of y amid sevens, and those."""
    wide = y.new_full((y.shape[0], y.shape[1] + 9), 7.0)
    wide[:, 4:-5] = y
    return wide[:, 4:-5], wide


def sevens_left(wide):
    return wide[:, :4].eq(7).all() and wide[:, -5:].eq(7).all()


@DTYPES
@CASES
@pytest.mark.parametrize("widths", [[50, 9, 33], [32, 64]], ids=str)
def test_sites_side_by_side(widths, slots, dtype):
    group = group_of(RANKS[: len(widths)], IN, widths, dtype)
    x, planes, tiles, plan = shrunk(slots, group, split_k=3)
    y = drawn(len(slots), sum(widths), dtype=dtype, seed=4)
    out, wide = inside(y)
    expand(out, planes, group, tiles, plan)
    assert_close("y", group_reference(y, x, group, slots), out, TOLERANCE[dtype])
    base = rows_of_base(slots)
    assert same_bits(out[base], y[base])
    assert sevens_left(wide)


@DTYPES
@CASES
@pytest.mark.parametrize("split_k", [1, 3])
def test_gate(split_k, slots, dtype):
    group = group_of(RANKS[:2], IN, [37, 37], dtype)
    x, planes, tiles, plan = shrunk(slots, group, split_k)
    y = drawn(len(slots), 74, dtype=dtype, seed=4)
    got = expand_gate(inside(y)[0], planes, group, tiles, plan)
    wanted = row_cases.gated(group_reference(y, x, group, slots))
    assert_close("gate", wanted, got, 3 * TOLERANCE[dtype])
    apart = y.clone()
    expand(apart, planes, group, tiles, plan)
    assert torch.equal(got, silu_gate(apart))


@DTYPES
@CASES
@pytest.mark.parametrize("heads", [(4, 2, 2), (1, 1, 1)], ids=str)
def test_rotary(heads, slots, dtype):
    group = group_of(RANKS, IN, [n * WIDTH for n in heads], dtype)
    _, planes, tiles, plan = shrunk(slots, group, split_k=3)
    y = drawn(len(slots), sum(heads) * WIDTH, dtype=dtype, seed=4)
    angle = drawn(len(slots), WIDTH, dtype=torch.float32, seed=5)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    got, wide = inside(y)
    expand_rotary(got, cos, sin, planes, group, tiles, plan)
    apart = y.clone()
    expand(apart, planes, group, tiles, plan)
    rotary_(apart[:, : (heads[0] + heads[1]) * WIDTH], cos, sin)
    assert torch.equal(got, apart)
    assert sevens_left(wide)


@DTYPES
@CASES
@pytest.mark.parametrize("split_k", [1, 3])
def test_sum(split_k, slots, dtype):
    group = group_of(RANKS[:1], IN, [50], dtype)
    _, planes, tiles, plan = shrunk(slots, group, split_k)
    y, total = (drawn(len(slots), 50, dtype=dtype, seed=seed) for seed in (4, 5))
    total *= 300  # beside which a term alone would be lost
    got, wide = inside(total)
    expand_sum(got, y, planes, group, tiles, plan)
    expand(y, planes, group, tiles, plan)
    assert torch.equal(got, total + y)
    assert sevens_left(wide)


@pytest.fixture(params=[(False, False), (False, True), (True, True)], ids=str)
def form(request, monkeypatch):
    """A plan that says so, and streams that only note what is asked of them."""
    beside, fused = request.param
    noted = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            noted.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def on(stream):
        noted.append(f"on {stream.name}")
        yield
        noted.append("back")

    main, side = Stream("main"), Stream("side")
    cuda = SimpleNamespace(current_stream=lambda device: main, stream=on)
    monkeypatch.setattr(lora_triton, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(lora_triton, "side_stream", lambda device: side)
    for name in ("shrink", "expand", "expand_gate", "expand_rotary", "expand_sum"):
        monkeypatch.setattr(lora_triton, name, noting(noted, name))
    plan = replace(plan_for(IN, 90, 40, 16, torch.float32), beside=beside, fused=fused)
    return plan, noted


def noting(noted, name):
    launch = getattr(lora_triton, name)

    def noted_launch(*args):
        noted.append(name)
        return launch(*args)

    return noted_launch


FUSED = {"add_to": "expand", "gate": "expand_gate", "rotate": "expand_rotary", "sum": "expand_sum"}


@pytest.mark.parametrize("what", FUSED)
def test_what_a_plan_says(form, what):
    plan, noted = form
    slots, width = SLOTS["mixed"], 30
    sites = {"gate": 2, "sum": 1}.get(what, 3)
    widths = [width] * sites
    group = group_of(RANKS[:sites], IN, widths, torch.float32)
    x = drawn(len(slots), IN, dtype=torch.float32)
    y = drawn(len(slots), sum(widths), dtype=torch.float32, seed=4)
    wanted = group_reference(y, x, group, slots)
    shrinking = Shrinking(x, group, tiles_of(slots), plan)
    begun = ["side waits for main", "on side", "shrink", "back"] if plan.beside else ["shrink"]
    assert noted == begun
    if what == "add_to":
        shrinking.add_to(y)
    elif what == "gate":
        y, wanted = shrinking.gate(y), row_cases.gated(wanted)
    elif what == "sum":
        total = drawn(len(slots), width, dtype=torch.float32, seed=5)
        y, wanted = total.clone(), total + wanted
        shrinking.sum(y, drawn(len(slots), width, dtype=torch.float32, seed=4))
    else:
        cos, sin = (drawn(len(slots), WIDTH, dtype=torch.float32, seed=s) for s in (5, 6))
        shrinking.rotate(y, cos, sin)
        rotary_(wanted[:, : 2 * width], cos, sin)
    joined = ["main waits for side"] if plan.beside else []
    assert noted == [*begun, *joined, FUSED[what] if plan.fused else "expand"]
    assert_close(what, wanted, y, 4 * TOLERANCE[torch.float32])
