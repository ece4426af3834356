"""Decoder layers in one call against the same layers made of references, operator by operator."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from lora_cases import assert_close
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lorabatch_kernels import (
    DecoderLayer,
    DecoderLayers,
    LayerStep,
    PackedWeight,
    RowSpans,
    SiteGroup,
    add_lora_reference,
    attend_reference,
    build_step_map,
)

HIDDEN, HEADS, KV_HEADS, WIDTH, INNER = 48, 4, 2, 16, 80
OUTS = ((HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH), (HIDDEN,), (INNER, INNER), (HIDDEN,))
INS = (HIDDEN, HEADS * WIDTH, HIDDEN, INNER)
POSITIONS, EPSILON, SCALE = 3 * 64, 1e-5, 0.25
# (tokens, positions before, slot) of each sequence: two decode, one begins, one goes on
SEQUENCES = ((1, 20, 0), (1, 0, -1), (15, 0, 1), (40, 9, 0))
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


class Layer:
    """Random weights and adapters in both forms."""

    def __init__(self, dtype, biased, seed):
        draw = torch.Generator().manual_seed(seed)
        self.weights, self.biases, self.groups = [], [], []
        for fan_in, outs in zip(INS, OUTS, strict=True):
            self.weights.append(torch.randn(sum(outs), fan_in, generator=draw).to(dtype) / 7)
            bias = torch.randn(sum(outs), generator=draw).to(dtype) if biased else None
            self.biases.append(bias)
            group = SiteGroup.allocate(2, 20, fan_in, outs, dtype, "cpu")
            for site, (slot, rank) in itertools.product(group.sites, ((0, 5), (1, 18))):
                a = torch.randn(rank, fan_in, generator=draw).to(dtype) / 7
                b = torch.randn(site.out_features, rank, generator=draw).to(dtype) / 7
                site.load(slot, a, b, 0.7)
            self.groups.append(group)
        self.norms = [(1 + torch.rand(HIDDEN, generator=draw).to(dtype), EPSILON) for _ in "12"]
        self.pools = [
            torch.randn(KV_HEADS, 4 * POSITIONS, WIDTH, generator=draw).to(dtype) for _ in "kv"
        ]

    @property
    def products(self):
        packed = (PackedWeight(*both) for both in zip(self.weights, self.biases, strict=True))
        return list(zip(packed, self.groups, strict=True))


def norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * weight.float()


def reference(layer, h, cos, sin, index, spans, slots, window):
    """fp32 [tokens, HIDDEN], and the pools that it leaves."""

    def product(x, number):
        bias = layer.biases[number]
        weight = layer.weights[number].float()
        y = F.linear(x, weight, None if bias is None else bias.float())
        sites = layer.groups[number]
        parts = zip(sites.split(y), sites.sites, strict=True)
        return torch.cat([add_lora_reference(part, x, site, slots) for part, site in parts], dim=1)

    h, (keys, values) = h.float(), (pool.float() for pool in layer.pools)
    qkv = product(norm(h, layer.norms[0][0]), 0).view(len(slots), -1, WIDTH).transpose(0, 1)
    q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS])
    q, k = (x[0] for x in apply_rotary_pos_emb(q[None], k[None], cos[None], sin[None]))
    keys[:, index], values[:, index] = k, v
    out = [attend_reference(q, keys, values, span, SCALE, window) for span in spans]
    h = h + product(torch.cat(out).flatten(1), 1)
    gate, up = product(norm(h, layer.norms[1][0]), 2).split(INNER, dim=1)
    return h + product(F.silu(gate) * up, 3), (keys, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("kept", [None, [0, 1, 16, 56], [1], []])
@pytest.mark.parametrize("count", [1, 2])
def test_layers_are_their_operators(dtype, window, biased, adapted, kept, count):
    layers = [Layer(dtype, biased, seed) for seed in range(count)]
    slots, spans, index, angles = [], [], [], []
    for row, (run, past, slot) in enumerate(SEQUENCES):
        spans.append((len(slots), run, past, row * POSITIONS))
        index += range(row * POSITIONS + past, row * POSITIONS + past + run)
        angles += [[(past + i) / (d + 1) for d in range(WIDTH // 2)] * 2 for i in range(run)]
        slots += [slot if adapted else -1] * run
    cos, sin = (f(torch.tensor(angles)).to(dtype) for f in (torch.cos, torch.sin))
    h = torch.randn(len(slots), HIDDEN, generator=torch.Generator().manual_seed(4)).to(dtype)
    places = torch.tensor(index)
    wanted, pools = h, []
    for layer in layers:
        turns = (cos.float(), sin.float())
        wanted, left = reference(layer, wanted, *turns, places, spans, slots, window)
        pools.append(left)

    before = h.clone()
    seconds = torch.zeros(4, dtype=torch.float64)
    parts = [(layer.products, layer.norms, layer.pools) for layer in layers]
    made = DecoderLayers([DecoderLayer(*part, HEADS, SCALE, window) for part in parts])
    rows = range(len(slots)) if kept is None else kept
    of_kept = (
        torch.tensor(rows, dtype=torch.int64),
        build_step_map([slots[r] for r in rows], "cpu"),
    )
    step_map, row_spans = build_step_map(slots, "cpu"), RowSpans.of(spans)
    shared = (cos, sin, places, row_spans, step_map, None if kept is None else of_kept, seconds)
    made(h, LayerStep(made.products, *shared))
    tolerance = TOLERANCE[dtype] * count
    if rows:
        assert_close("hidden states", wanted[rows], h[rows].float(), tolerance)
    for layer, left in zip(layers, pools, strict=True):
        for name, pool, own in zip(("keys", "values"), left, layer.pools, strict=True):
            assert_close(name, pool, own.float(), tolerance)
    products, lora, attention, rest = seconds.tolist()
    assert min(products, attention, rest) > 0
    assert (lora > 0) == adapted
    if kept == [] and count == 1:
        assert torch.equal(h, before)
