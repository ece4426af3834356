"""Compiling a Triton kernel for a GPU that is not there, and what became of it.

Only in a process without TRITON_INTERPRET. Spills show as stack or local memory in what the
cuobjdump shipped with triton says of a cubin, and as counts in AMD's assembly.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorabatch_kernels.plan import COMPILE_OPTIONS

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TENSOR_CORES = ("wgmma", "mma.sync", "tcgen05.mma")


def compile_for(
    arch: int | str,
    fn: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: bool = True,
    unspecialized: tuple[str, ...] = (),
    **options: int,
) -> Any:
    """`arch` 90: sm_90; "gfx942": AMD's. `aligned`: the arguments but `unspecialized` and floats
    are multiples of 16."""
    arguments = [name for name in fn.arg_names if name not in constants]
    signature = {name: types.get(name, "constexpr") for name in fn.arg_names}
    assert all(signature[name] != "constexpr" for name in arguments), signature
    signature |= dict.fromkeys(constants, "constexpr")
    places = [
        (fn.arg_names.index(name),)
        for name in arguments
        if name not in unspecialized and signature[name] != "fp32"
    ]
    source = ASTSource(
        fn=fn,
        signature=signature,
        constexprs={(fn.arg_names.index(name),): value for name, value in constants.items()},
        attrs={place: [["tt.divisibility", 16]] for place in places} if aligned else {},
    )
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    return triton.compile(source, target=target, options={**COMPILE_OPTIONS, **options})


def spilled_bytes(compiled: Any, folder: Path) -> int:
    """Of a cubin."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [str(CUOBJDUMP), "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    return int(found[1]) + int(found[2])


def check(compiled: Any, arch: int | str, folder: Path, scalars: bool = True) -> None:
    """No spill, and no more shared memory than there is. `scalars` False: on AMD scalar registers
    may go to lanes of vector registers, as long as nothing goes to memory."""
    assert compiled.metadata.shared <= SHARED_BYTES[arch]
    if isinstance(arch, int):
        assert spilled_bytes(compiled, folder) == 0
        return
    assert compiled.asm["hsaco"]
    other = "sgpr_spill_count" if scalars else "private_segment_fixed_size"
    spills = re.findall(rf"\.(?:vgpr_spill_count|{other}): +(\d+)", compiled.asm["amdgcn"])
    assert len(spills) == 2, "the assembly names no spills"
    assert set(spills) == {"0"}


def on_tensor_cores(compiled: Any) -> bool:
    return any(op in compiled.asm["ptx"] for op in TENSOR_CORES)
