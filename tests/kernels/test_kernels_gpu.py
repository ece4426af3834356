"""The Triton kernels on a real GPU, through `add_lora`, against the per-token reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lora_cases import Shape, alone, assert_close, poison_the_rest, rows_of_base, same_bits

from lorabatch_kernels import (
    add_lora,
    add_lora_reference,
    buffer_ints,
    build_step_map,
    tile_bound,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

# The reference sums v in fp32 and does not round it; the kernels round v to bf16 or fp16.
GPU_TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
MIXED = Shape([0, 1, -1, 2, 5, 0, 1, -1, 3, 2] * 7, {0: 1, 1: 3, 2: 64, 3: 8, 5: 16})
SHAPES = {
    "odd": MIXED,
    "SmolLM2 down": replace(MIXED, in_features=1536, out_features=576),
    "8B o": replace(MIXED, in_features=4096, out_features=4096),
    "8B down": replace(MIXED, in_features=14336, out_features=4096, max_rank=128),
    "prefill and decode": replace(MIXED, in_features=576, slots=[1] * 700 + MIXED.slots),
    "one token": replace(MIXED, slots=[2], in_features=576, out_features=192),
}


@pytest.mark.parametrize("dtype", list(GPU_TOLERANCE), ids=str)
@pytest.mark.parametrize("tile", [16, 32, 64, 128])
@pytest.mark.parametrize("name", SHAPES)
def test_against_reference(name, tile, dtype):
    shape = SHAPES[name]
    site = poison_the_rest(shape.site(dtype, "cuda"))
    x, y = shape.x_y(dtype, "cuda")
    ref = add_lora_reference(y, x, site, shape.slots)
    out = y.clone()
    add_lora(out, x, alone(site), build_step_map(shape.slots, "cuda", tile=tile))
    assert_close("y", ref, out, GPU_TOLERANCE[dtype])
    base = rows_of_base(shape.slots).to("cuda")
    assert same_bits(out[base], y[base])


def test_a_captured_graph_serves_other_adapters_and_other_batches():
    tokens, max_tiles = 8, tile_bound(8, 7, 16)
    buffer = torch.zeros(buffer_ints(tokens, max_tiles), dtype=torch.int32, device="cuda")
    options = {"max_tiles": max_tiles, "buffer": buffer}
    site = MIXED.site(torch.bfloat16, "cuda")
    first = replace(MIXED, slots=[0, 1, 2, 3, 5, -1, -1, -1])
    x, y = first.x_y(torch.bfloat16, "cuda")
    out = y.clone()
    step_map = build_step_map(first.slots, "cuda", **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        add_lora(out, x, alone(site), step_map)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_lora(out, x, alone(site), step_map)
    site.load(0, torch.randn(33, 70) / 8, torch.randn(50, 33), 0.7, start=100)
    site.clear(2)
    for slots in ([0, 1, 2, 3, 5, -1, -1, -1], [0] * 8, [-1, 5] * 4):
        build_step_map(slots, "cuda", **options)
        out.copy_(y)
        graph.replay()
        ref = add_lora_reference(y, x, site, slots)
        assert_close(f"y of {slots}", ref, out, GPU_TOLERANCE[torch.bfloat16])


def test_dtypes_must_agree():
    site = MIXED.site(torch.float32, "cuda")
    x, y = MIXED.x_y(torch.bfloat16, "cuda")
    with pytest.raises(ValueError, match=r"the sites are torch.float32"):
        add_lora(y, x, alone(site), build_step_map(MIXED.slots, "cuda"))
