"""Every kernel variant compiles for sm_80, sm_90 and sm_100 without a spill, and for gfx942.

Not collected by name: test_kernels_triton.py runs this file in a process without TRITON_INTERPRET.
No GPU is needed. Spills show as stack or local memory in what the cuobjdump shipped with triton
says of a cubin, and as counts in AMD's assembly.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorabatch_kernels.expand import expand_kernel
from lorabatch_kernels.plan import COMPILE_OPTIONS, Plan, plan_for
from lorabatch_kernels.shrink import shrink_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
GFX942_LDS_BYTES = 64 * 1024
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
INTS = ("order", "tile_slot", "tile_start", "tile_len", "row0", "rank")


@dataclass(frozen=True)
class Layer:
    """A linear layer and its adapters; `aligned`: pointers and strides are multiples of 16."""

    features: int
    max_rank: int
    tile: int
    aligned: bool = True


LAYERS = {
    "decode": Layer(4096, 64, 16),
    "decode of a small model": Layer(576, 16, 16),
    "prefill": Layer(4096, 64, 64),
    "odd sizes": Layer(77, 5, 16, aligned=False),
}
LARGE = {"tile 32": Layer(4096, 64, 32), "tile 128": Layer(4096, 64, 128)}


def constants(layer: Layer, plan: Plan) -> dict[str, dict[str, int]]:
    shared = {"MAX_RANK": layer.max_rank, "SPLIT_K": plan.split_k, "BLOCK_M": plan.block_m}
    shared |= {"BLOCK_R": plan.block_r}
    return {
        "shrink": {"K": layer.features, "BLOCK_K": plan.block_k, **shared},
        "expand": {"N": layer.features, "BLOCK_N": plan.block_n, **shared},
    }


def compile_kernel(
    kernel: str, layer: Layer, dtype: torch.dtype, arch: int | str, **options: int
) -> Any:
    """`arch` 90: sm_90; "gfx942": AMD's."""
    plan = plan_for(layer.features, layer.max_rank, layer.tile, dtype)
    fn = {"shrink": shrink_kernel, "expand": expand_kernel}[kernel]
    consts = constants(layer, plan)[kernel]
    element = f"*{NAMES[dtype]}"
    types = {**dict.fromkeys(("x", "a", "b", "y"), element), **dict.fromkeys(INTS, "*i32")}
    types |= {"planes": "*fp32", "scale": "*fp32", "tokens": "i32"}
    types |= {"x_stride": "i32", "y_stride": "i32"}
    signature = {name: "constexpr" if name in consts else types[name] for name in fn.arg_names}
    names = [name for name in fn.arg_names if name not in consts and name != "tokens"]
    attrs = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}
    source = ASTSource(
        fn=fn,
        signature=signature,
        constexprs={(fn.arg_names.index(name),): value for name, value in consts.items()},
        attrs=attrs if layer.aligned else {},
    )
    stages = {"shrink": plan.shrink_stages, "expand": plan.expand_stages}[kernel]
    options = {"num_warps": plan.num_warps, "num_stages": stages, **COMPILE_OPTIONS, **options}
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    return triton.compile(source, target=target, options=options)


def spilled_bytes(compiled: Any, folder: Path) -> int:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [str(CUOBJDUMP), "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    return int(found[1]) + int(found[2])


def check(kernel: str, layer: Layer, dtype: torch.dtype, arch: int, folder: Path) -> None:
    compiled = compile_kernel(kernel, layer, dtype, arch)
    assert spilled_bytes(compiled, folder) == 0
    assert 0 < compiled.metadata.shared <= SHARED_BYTES[arch]
    on_tensor_cores = any(op in compiled.asm["ptx"] for op in ("wgmma", "mma.sync", "tcgen05.mma"))
    assert on_tensor_cores == (dtype != torch.float32), "fp32 must not become tf32"


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", list(NAMES), ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kernel", ["shrink", "expand"])
def test_compiles(kernel, name, dtype, arch, tmp_path):
    check(kernel, LAYERS[name], dtype, arch, tmp_path)


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("kernel", ["shrink", "expand"])
def test_compiles_with_large_tiles(kernel, name, arch, tmp_path):
    check(kernel, LARGE[name], torch.bfloat16, arch, tmp_path)


@pytest.mark.parametrize("dtype", list(NAMES), ids=str)
@pytest.mark.parametrize("name", [*LAYERS, *LARGE])
@pytest.mark.parametrize("kernel", ["shrink", "expand"])
def test_compiles_for_amd(kernel, name, dtype):
    compiled = compile_kernel(kernel, {**LAYERS, **LARGE}[name], dtype, "gfx942")
    assert compiled.asm["hsaco"]
    assert 0 < compiled.metadata.shared <= GFX942_LDS_BYTES
    spills = re.findall(r"\.[sv]gpr_spill_count: +(\d+)", compiled.asm["amdgcn"])
    assert spills, "the assembly names no spill counts"
    assert set(spills) == {"0"}


def test_a_spill_would_be_seen(tmp_path):
    starved = compile_kernel("expand", LAYERS["prefill"], torch.bfloat16, 80, maxnreg=32)
    assert spilled_bytes(starved, tmp_path) > 0
