"""Norm, gate and rotary embedding compile for sm_80, sm_90, sm_100 and gfx942, and spill nothing.

Not collected by name: test_kernels_triton.py runs this file in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import pytest
from ahead_of_time import NAMES, SHARED_BYTES, check, compile_for

from lorabatch_kernels.rows_triton import rms_norm_kernel, rotary_kernel, silu_gate_kernel

KERNELS = {
    "norm": (rms_norm_kernel, {"WIDTH": 4096, "BLOCK": 4096}, 8),
    "norm of wide rows": (rms_norm_kernel, {"WIDTH": 16384, "BLOCK": 16384}, 16),
    "gate": (silu_gate_kernel, {"WIDTH": 14336, "BLOCK": 1024}, 4),
    "rotary": (rotary_kernel, {"HEADS": 40, "HALF": 64, "BLOCK_H": 16, "BLOCK_D": 64}, 4),
}


@pytest.mark.parametrize("dtype", list(NAMES), ids=str)
@pytest.mark.parametrize("arch", list(SHARED_BYTES))
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name, arch, dtype, tmp_path):
    fn, sizes, warps = KERNELS[name]
    types = dict.fromkeys(("out", "x", "weight", "cos", "sin"), f"*{NAMES[dtype]}")
    types |= {"epsilon": "fp32", "x_stride": "i32"}
    check(compile_for(arch, fn, types, sizes, num_warps=warps), arch, tmp_path)
