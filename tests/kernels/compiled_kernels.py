"""Every kernel variant compiles for sm_80, sm_90 and sm_100 without a spill, and for gfx942.

Not collected by name: test_kernels_triton.py runs this file in a process without TRITON_INTERPRET.
No GPU is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ahead_of_time import NAMES, check, compile_for, on_tensor_cores, spilled_bytes

from lorabatch_kernels.expand import expand_kernel
from lorabatch_kernels.expand_into import (
    expand_gate_kernel,
    expand_rotary_kernel,
    expand_sum_kernel,
    gate_block,
)
from lorabatch_kernels.plan import Plan, plan_for
from lorabatch_kernels.shrink import shrink_kernel

INTS = ("order", "tile_slot", "tile_start", "tile_len", "row0", "rank", "affine")
KERNELS = {
    "shrink": shrink_kernel,
    "expand": expand_kernel,
    "expand, gate": expand_gate_kernel,
    "expand, rotary": expand_rotary_kernel,
    "expand, sum": expand_sum_kernel,
}


HALVES = [torch.bfloat16, torch.float16]
KERNELS_AND_DTYPES = [(kernel, dtype) for kernel in KERNELS for dtype in HALVES]
KERNELS_AND_DTYPES += [(kernel, torch.float32) for kernel in ("shrink", "expand")]  # never fused


@dataclass(frozen=True)
class Layer:
    """Linear layers of one input and their adapters, `features` in and out of each; `aligned`:
    pointers and strides are multiples of 16."""

    features: int
    max_rank: int
    tile: int
    aligned: bool = True
    sites: int = 1


LAYERS = {
    "decode": Layer(4096, 64, 16),
    "decode of three": Layer(4096, 64, 16, sites=3),
    "decode of a small model": Layer(576, 16, 16),
    "prefill": Layer(4096, 64, 64),
    "odd sizes": Layer(77, 5, 16, aligned=False),
}
LARGE = {"tile 32": Layer(4096, 64, 32), "tile 128": Layer(4096, 64, 128, sites=3)}


def constants(kernel: str, layer: Layer, plan: Plan) -> dict[str, int]:
    shared = {"MAX_RANK": layer.max_rank, "SPLIT_K": plan.split_k, "BLOCK_M": plan.block_m}
    shared |= {"BLOCK_R": plan.block_r}
    columns = [layer.features] * layer.sites + [0] * (3 - layer.sites)
    n = {f"N{number}": count for number, count in enumerate(columns)}
    heads = {"Q_HEADS": 32, "K_HEADS": 8, "HALF": 64, "BLOCK_N": 64}
    own = {
        "shrink": {"K": layer.features, "SITES": layer.sites, "BLOCK_K": plan.block_k},
        "expand": {**n, "SITES": layer.sites, "BLOCK_N": plan.block_n},
        "expand, gate": {"WIDTH": layer.features, "BLOCK_N": gate_block(plan)},
        "expand, rotary": heads,
        "expand, sum": {"N": layer.features, "BLOCK_N": plan.block_n},
    }
    return {**own[kernel], **shared}


def compile_kernel(
    kernel: str, layer: Layer, dtype: torch.dtype, arch: int | str, **options: int
) -> Any:
    """`arch` 90: sm_90; "gfx942": AMD's."""
    plan = plan_for(layer.features, layer.features, layer.max_rank, layer.tile, dtype)
    element = f"*{NAMES[dtype]}"
    tensors = ("x", "a", "b", "y", "out", "cos", "sin", "total")
    types = {**dict.fromkeys(tensors, element), **dict.fromkeys(INTS, "*i32")}
    types |= {"planes": "*fp32", "scale": "*fp32", "tokens": "i32", "slots": "i32"}
    types |= dict.fromkeys(("x_stride", "y_stride", "a_stride", "b_stride", "total_stride"), "i32")
    stages = plan.shrink_stages if kernel == "shrink" else plan.expand_stages
    options = {"num_warps": plan.num_warps, "num_stages": stages, **options}
    consts = constants(kernel, layer, plan)
    fn, unspecialized = KERNELS[kernel], ("tokens", "slots")
    return compile_for(arch, fn, types, consts, layer.aligned, unspecialized, **options)


def check_nvidia(kernel: str, layer: Layer, dtype: torch.dtype, arch: int, folder: Path) -> None:
    compiled = compile_kernel(kernel, layer, dtype, arch)
    check(compiled, arch, folder)
    assert compiled.metadata.shared > 0
    assert on_tensor_cores(compiled) == (dtype != torch.float32), "fp32 must not become tf32"


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS_AND_DTYPES, ids=str)
def test_compiles(kernel, name, dtype, arch, tmp_path):
    check_nvidia(kernel, LAYERS[name], dtype, arch, tmp_path)


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_with_large_tiles(kernel, name, arch, tmp_path):
    check_nvidia(kernel, LARGE[name], torch.bfloat16, arch, tmp_path)


@pytest.mark.parametrize("name", [*LAYERS, *LARGE])
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS_AND_DTYPES, ids=str)
def test_compiles_for_amd(kernel, name, dtype, tmp_path):
    compiled = compile_kernel(kernel, {**LAYERS, **LARGE}[name], dtype, "gfx942")
    check(compiled, "gfx942", tmp_path)
    assert compiled.metadata.shared > 0


def test_a_spill_would_be_seen(tmp_path):
    starved = compile_kernel("expand", LAYERS["prefill"], torch.bfloat16, 80, maxnreg=32)
    assert spilled_bytes(starved, tmp_path) > 0
