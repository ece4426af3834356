"""Kernels: LoRA for many adapters in one batch, attention over the KV cache, and the rest of a
decoder layer, on a GPU (Triton) or a CPU (C).

Build a `StepMap` once a step, hold a `SiteGroup` for the linear layers of each input, call
`add_lora` on their output. Importing this package loads torch and never triton.
"""

from lorabatch_kernels.argmax_cpu import argmax, can_argmax
from lorabatch_kernels.attention_cpu import (
    RowSpans,
    attend_reference,
    attend_rows,
    can_attend,
)
from lorabatch_kernels.group import SiteGroup
from lorabatch_kernels.layer_cpu import DecoderLayer, DecoderLayers, LayerStep
from lorabatch_kernels.lora import LoraTerms, add_lora, add_lora_reference
from lorabatch_kernels.lora_cpu import can_add_lora
from lorabatch_kernels.matmul_cpu import PackedWeight
from lorabatch_kernels.paged import PagedSpans, attend_paged, store_paged
from lorabatch_kernels.rows import can_do_rows, rms_norm, rotary_, silu_gate
from lorabatch_kernels.site import LoraSite
from lorabatch_kernels.step_map import StepMap, build_step_map
from lorabatch_kernels.tiles import BASE_SLOT, buffer_ints, tile_bound
from lorabatch_kernels.weights import LoraWeights

__all__ = [
    "BASE_SLOT",
    "DecoderLayer",
    "DecoderLayers",
    "LayerStep",
    "LoraSite",
    "LoraTerms",
    "LoraWeights",
    "PackedWeight",
    "PagedSpans",
    "RowSpans",
    "SiteGroup",
    "StepMap",
    "add_lora",
    "add_lora_reference",
    "argmax",
    "attend_paged",
    "attend_reference",
    "attend_rows",
    "buffer_ints",
    "build_step_map",
    "can_add_lora",
    "can_argmax",
    "can_attend",
    "can_do_rows",
    "rms_norm",
    "rotary_",
    "silu_gate",
    "store_paged",
    "tile_bound",
]
