"""LoRA on a CPU, in C and without it, against the per-token reference and PEFT's own layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lora_cases import TOLERANCE, Shape, alone, assert_close, fill, rows_of_base, same_bits
from torch import nn

from lorabatch_kernels import (
    SiteGroup,
    add_lora,
    add_lora_reference,
    build_step_map,
    native,
)

RANKS = {0: 1, 1: 3, 2: 64, 3: 8, 5: 16}  # slot 4 is empty
CASES = {
    "interleaved with base": [0, 1, -1, 2, 0, 0, 1, -1, 3, 5, 2] * 3,
    "one token each": [0, 1, 2, 3],
    "scattered slots": [5, 1, 3] * 4,
    "one slot": [2] * 7,
    "one scattered slot": [1, -1] * 9,
    "an empty slot among them": [4, 3, 4, 2, 1],
    "in order, no gather": [0, 0, 1, 1, 2, 2, 3, 3],
    "long and short": [2] * 100 + [0, 1, 3, 5] * 2 + [-1],
    "long and scattered": [3, 1] * 90 + [0, 2, 5],
    "wide batch": [slot for slot in (0, 1, 2, 3) for _ in range(20)],
    "wide scattered batch": [slot for slot in (1, 3, 5, 0) for _ in range(20)] + [-1],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=["C", "torch"])
def which(request, monkeypatch):
    """Every test runs with the C kernel, which must be there, and without it."""
    if request.param == "C":
        assert native.library() is not None, native.problem()
    else:
        monkeypatch.setattr(native, "library", lambda: None)
    return request.param


def run(shape: Shape, dtype: torch.dtype):
    site = shape.site(dtype)
    x, y = shape.x_y(dtype)
    ref = add_lora_reference(y, x, site, shape.slots)
    out = y.clone()
    add_lora(out, x, alone(site), build_step_map(shape.slots, "cpu"))
    return y, ref, out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_reference(name, dtype):
    shape = Shape(CASES[name], RANKS)
    y, ref, out = run(shape, dtype)
    assert_close("y", ref, out, TOLERANCE[dtype])
    assert_close("delta", ref - y.float(), out.float() - y.float(), 3 * TOLERANCE[dtype])
    base = rows_of_base(shape.slots)
    assert same_bits(out[base], y[base])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gain_and_shift(name, dtype):
    shape = Shape(CASES[name], {**RANKS, 4: 0}, affine=(1, 2, 4))
    y, ref, out = run(shape, dtype)
    assert_close("y", ref, out, TOLERANCE[dtype])
    base = rows_of_base(shape.slots)
    assert same_bits(out[base], y[base])
    others = torch.tensor([slot in (0, 3, 5) for slot in shape.slots])
    _, _, without = run(replace(shape, affine=(4,)), dtype)
    assert same_bits(out[others], without[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("odd", [(1, 1), (7, 129), (576, 192), (193, 1), (257, 515)])
def test_odd_sizes(odd, dtype):
    shape = Shape([0, 2, 1, -1, 2], RANKS, in_features=odd[0], out_features=odd[1])
    _, ref, out = run(shape, dtype)
    assert_close("y", ref, out, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_gets_the_same_bits_in_any_company(dtype, which):
    if which == "torch":
        return  # its products may round otherwise for another number of rows
    slots = [0, 2, 1, -1, 2, 5] * 9
    shape = Shape(slots, RANKS, 300, 270)
    site = shape.site(dtype)
    x, y = shape.x_y(dtype)
    together = y.clone()
    add_lora(together, x, alone(site), build_step_map(slots, "cpu"))
    for count in (1, 3, 8):
        for first in range(0, len(slots) - count, 7):
            own = slice(first, first + count)
            few = y[own].clone()
            add_lora(few, x[own], alone(site), build_step_map(slots[own], "cpu"))
            assert same_bits(few, together[own])


def test_a_module_that_no_adapter_changes_leaves_y_alone():
    shape = Shape([4, 4, -1, 4] + [4] * 300, RANKS)
    y, _, out = run(shape, torch.bfloat16)
    assert same_bits(out, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_base_tokens_is_unchanged_bit_for_bit(dtype):
    y, _, out = run(Shape([-1] * 9, RANKS), dtype)
    assert same_bits(out, y)


@pytest.mark.parametrize("slots", [[0, 1, -1, 2], [1] * 300, [0, 2, 3], [1, 0] * 80])
def test_stale_rows_of_a_bigger_adapter_do_not_leak(slots):
    shape = Shape(slots, {0: 8, 1: 3, 2: 1, 3: 5})
    site = shape.site(torch.float32)
    rows = {s: [part.clone() for part in site.rows(s)] for s in shape.ranks}
    for slot, (a, b) in rows.items():
        nan = float("nan")
        site.load(slot, torch.full((64, 70), nan), torch.full((50, 64), nan), 1.0)
        site.load(slot, a, b.t(), 0.7)
    x, y = shape.x_y(torch.float32)
    ref = add_lora_reference(y, x, site, slots)
    add_lora(y, x, alone(site), build_step_map(slots, "cpu"))
    assert_close("y", ref, y, TOLERANCE[torch.float32])


@pytest.mark.parametrize("broken", [0, 2])
def test_an_adapter_full_of_nan_spoils_only_its_own_tokens(broken):
    slots = [0, 1, -1, 2, 1, 1, 2, 3]
    shape = Shape(slots, {0: 8, 1: 3, 2: 64, 3: 8})
    site = shape.site(torch.float32)
    x, y = shape.x_y(torch.float32)
    ref = add_lora_reference(y, x, site, slots)
    rank = shape.ranks[broken]
    nan = float("nan")
    site.load(broken, torch.full((rank, 70), nan), torch.full((50, rank), nan), 1.0)
    add_lora(y, x, alone(site), build_step_map(slots, "cpu"))
    own = torch.tensor([slot == broken for slot in slots])
    assert y[own].isnan().all()
    assert_close("y of the others", ref[~own], y[~own], TOLERANCE[torch.float32])


@pytest.mark.parametrize("slots", [[0, 1, -1, 2, 0], [2] * 100, [0, 1, 2], [1, 2] * 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slice_of_a_fused_projection(slots, dtype):
    shape = Shape(slots, RANKS)
    site = shape.site(dtype)
    x, y = shape.x_y(dtype)
    wide_x, wide_y = torch.zeros(len(slots), 200, dtype=dtype), torch.full((len(slots), 99), 7.0)
    wide_y = wide_y.to(dtype)
    wide_x[:, 3:73], wide_y[:, 20:70] = x, y
    add_lora(wide_y[:, 20:70], wide_x[:, 3:73], alone(site), build_step_map(slots, "cpu"))
    ref = add_lora_reference(y, x, site, slots)
    assert_close("y", ref, wide_y[:, 20:70], TOLERANCE[dtype])
    assert wide_y[:, :20].eq(7).all()
    assert wide_y[:, 70:].eq(7).all()


def test_one_map_serves_sites_of_different_shapes_and_ranks():
    slots = [5, 1, -1, 3, 1]
    step_map = build_step_map(slots, "cpu")
    for in_features, out_features, max_rank in ((70, 50, 64), (33, 200, 16), (70, 50, 20)):
        ranks = {slot: min(rank, max_rank) for slot, rank in RANKS.items()}
        shape = Shape(slots, ranks, in_features, out_features, max_rank)
        site = shape.site(torch.float32)
        x, y = shape.x_y(torch.float32)
        ref = add_lora_reference(y, x, site, slots)
        add_lora(y, x, alone(site), step_map)
        assert_close(f"y of {in_features}", ref, y, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [[0, 1, -1, 2, 0, 3], [1] * 20 + [0, 3], [3] * 9, [1, -1]])
def test_a_group_of_sites_that_share_their_input(slots, dtype):
    ranks = [{0: 3, 1: 17, 2: 40}, {3: 16}, {0: 8, 3: 1}]
    group = SiteGroup.allocate(5, 40, 70, [50, 9, 33], dtype, "cpu")
    for site, loaded in zip(group.sites, ranks, strict=True):
        fill(site, loaded, affine=[3] if 3 in loaded else ())
    x = torch.randn(len(slots), 70).to(dtype)
    y = torch.randn(len(slots), 92).to(dtype)
    parts = y.split([50, 9, 33], dim=1)
    refs = [add_lora_reference(p, x, s, slots) for p, s in zip(parts, group.sites, strict=True)]
    add_lora(y, x, group, build_step_map(slots, "cpu"))
    for number, (ref, part) in enumerate(zip(refs, parts, strict=True)):
        assert_close(f"y of site {number}", ref, part, TOLERANCE[dtype])


def test_agrees_with_peft_to_fp32_rounding():
    from peft.tuners.lora import Linear, LoraConfig

    torch.manual_seed(3)
    shape = Shape([0, -1, 2, 0, 1, 2, 2], {0: 8, 1: 3, 2: 64}, 576, 192)
    site = shape.site(torch.float32)
    base = nn.Linear(576, 192, bias=False)
    x, _ = shape.x_y(torch.float32)
    y = base(x).detach()
    add_lora(y, x, alone(site), build_step_map(shape.slots, "cpu"))
    for slot, rank in shape.ranks.items():
        config = LoraConfig(r=rank, lora_alpha=rank)
        layer = Linear(base, adapter_name="it", config=config, r=rank, lora_alpha=rank)
        a, b = site.rows(slot)
        layer.lora_A["it"].weight.data.copy_(a)
        layer.lora_B["it"].weight.data.copy_(b.t())
        layer.scaling["it"] = site.scales[slot]
        own = torch.tensor([other == slot for other in shape.slots])
        assert_close(f"y of slot {slot}", layer(x[own]).detach(), y[own], 1e-6)
    base_rows = rows_of_base(shape.slots)
    assert_close("y of base", base(x).detach()[base_rows], y[base_rows], 1e-9)
