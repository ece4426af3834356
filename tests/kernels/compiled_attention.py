"""Paged attention compiles for sm_80, sm_90, sm_100 and gfx942, and keeps its tiles in registers.

Not collected by name: test_kernels_triton.py runs this file in a process without TRITON_INTERPRET.
No GPU is needed. AMD's compiler may move scalars into lanes of vector registers, never into memory.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import triton
from ahead_of_time import NAMES, SHARED_BYTES, check, compile_for, on_tensor_cores

from lorabatch_kernels.attend_triton import attend_kernel, merge_kernel
from lorabatch_kernels.paged_triton import store_kernel
from lorabatch_kernels.plan import attention_plan

ELEMENTS = ("out", "query", "keys", "values", "key", "value", "sinks")
STRIDE = re.compile(r"(out|query|keys|values|key|value)_(head|token|block|at)$")
PREFILL, DECODE = 4 * 512, 4  # rows: tokens times heads of a group
PLAIN = {"sinks": None, "WINDOW": 0, "SOFTCAP": 0.0}

EVERY_DTYPE = pytest.mark.parametrize("dtype", list(NAMES), ids=str)
EVERY_ARCH = pytest.mark.parametrize("arch", list(SHARED_BYTES))
EVERY_KIND = pytest.mark.parametrize("rows", [PREFILL, DECODE], ids=["prefill", "decode"])


def types(fn: Any, dtype: torch.dtype) -> dict[str, str]:
    found = dict.fromkeys(ELEMENTS, f"*{NAMES[dtype]}") | {"index": "*i64", "scale": "fp32"}
    found |= dict.fromkeys(("starts", "lengths", "blocks"), "*i32")
    found |= dict.fromkeys(("partial", "weight"), "*fp32")
    found |= dict.fromkeys(("tokens", "table_width"), "i32")
    return found | {name: "i32" for name in fn.arg_names if STRIDE.match(name)}


def compile_attend(
    arch: int | str,
    dtype: torch.dtype,
    rows: int,
    width: int,
    **constants: Any,
) -> Any:
    plan = attention_plan(width, width, rows, dtype, arch if arch == "gfx942" else f"sm_{arch}")
    padded = max(16, triton.next_power_of_2(width))
    splits = {"SPLITS": 8} if rows == DECODE else {"SPLITS": 1, "partial": None, "weight": None}
    sizes = {"GROUP": 4, "D": width, "DV": width, "BLOCK_SIZE": 16}
    tile = {"BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n}
    tile |= {"BLOCK_D": padded, "BLOCK_DV": padded}
    return compile_for(
        arch,
        attend_kernel,
        types(attend_kernel, dtype),
        {**sizes, **splits, **tile, **constants},
        unspecialized=("table_width",),
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )


@EVERY_KIND
@EVERY_DTYPE
@EVERY_ARCH
@pytest.mark.parametrize("width", [64, 128, 256])
def test_attend(width, arch, dtype, rows, tmp_path):
    compiled = compile_attend(arch, dtype, rows, width, **PLAIN)
    check(compiled, arch, tmp_path, scalars=False)
    if isinstance(arch, int):
        assert on_tensor_cores(compiled) == (dtype != torch.float32), "fp32 must not become tf32"


@EVERY_KIND
@EVERY_ARCH
def test_attend_with_all_it_knows(arch, rows, tmp_path):
    knows = {"WINDOW": 4096, "SOFTCAP": 50.0, "GROUP": 3}
    compiled = compile_attend(arch, torch.bfloat16, rows, 80, **knows)
    check(compiled, arch, tmp_path, scalars=False)


@EVERY_DTYPE
@EVERY_ARCH
def test_merge(arch, dtype, tmp_path):
    sizes = {"DV": 128, "WINDOW": 0, "SPLITS": 32, "BLOCK_N": 64, "BLOCK_DV": 128}
    compiled = compile_for(arch, merge_kernel, types(merge_kernel, dtype), sizes)
    check(compiled, arch, tmp_path)


@EVERY_DTYPE
@EVERY_ARCH
def test_store(arch, dtype, tmp_path):
    sizes = {"D": 128, "DV": 128, "WIDTH": 128, "BLOCK_SIZE": 16, "BLOCK_T": 16}
    free = {"unspecialized": ("tokens",)}
    compiled = compile_for(arch, store_kernel, types(store_kernel, dtype), sizes, **free)
    check(compiled, arch, tmp_path)
