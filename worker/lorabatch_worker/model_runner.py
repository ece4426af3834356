"""The base model as a function from a step to logits.

Owns the model, its KV cache and its LoRA sites. The model is called as transformers calls it,
without its cache protocol: the attention function reads the step from the context. Raises
UnsupportedModel when it is built on a model that it would compute wrong.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from lorabatch_worker.attention import IMPLEMENTATION, register
from lorabatch_worker.base_model import BaseModel
from lorabatch_worker.block_manager import BlockManager, PagedBlocks
from lorabatch_worker.decoder_layer import fuse_layers
from lorabatch_worker.kv_cache import KVCache
from lorabatch_worker.lora_layers import attach_sites, own_weights, pack_head
from lorabatch_worker.probe import (
    PROBE_BLOCKS,
    PROBE_ROW_BLOCKS,
    PROBE_ROWS,
    check_attention,
    check_config,
    eager_logits,
)
from lorabatch_worker.row_manager import RowBlocks
from lorabatch_worker.scheduler import Chunk
from lorabatch_worker.step import StepContext, build_step

__all__ = ["ModelRunner"]


class ModelRunner:
    """Runs micro-batches of one base model. Used from one thread at a time."""

    def __init__(
        self,
        base: BaseModel,
        kv_cache_tokens: int,
        block_size: int,
        adapter_slots: int,
        max_adapter_rank: int,
        max_seqs: int = 32,
        prefix_cache: bool = True,
        rows: bool | None = None,
    ) -> None:
        """`rows`: whether the KV cache has a row for each sequence; None: on a CPU."""
        check_config(base.model.config)
        self.base = base
        self.model: Any = base.model
        self.device = base.device
        self.context = StepContext()
        budget = max(-(-kv_cache_tokens // block_size), PROBE_BLOCKS)
        self.blocks: BlockManager
        row_blocks = 0
        if rows is False or (rows is None and self.device.type != "cpu"):
            self.blocks = PagedBlocks(1 + budget, block_size, prefix_cache)
        else:
            row_blocks = max(-(-base.max_context_tokens // block_size), PROBE_ROW_BLOCKS)
            count = max(max_seqs, PROBE_ROWS)
            self.blocks = RowBlocks(count, row_blocks, budget, block_size, prefix_cache)
        self.cache = KVCache(self.blocks.num_blocks, block_size, self.context, row_blocks)
        name = f"{IMPLEMENTATION}_{id(self.cache)}"
        attend = register(self.cache, name)
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        wanted = eager_logits(base, block_size)
        self.sites = attach_sites(self.model, self.context, adapter_slots, max_adapter_rank)
        pack_head(self.model)
        own_weights(self.model)
        self.fused = fuse_layers(self.model, self.cache, attend)
        check_attention(self, name, wanted)

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk]) -> Tensor:
        """Compute a plan's chunks: logits [n, vocabulary] of the n chunks that sample."""
        self.cache.apply(self.blocks.take_changes())
        step = build_step(chunks, self.blocks.block_size, self.device, self.cache.row_blocks > 0)
        self.context.enter(step)
        keep: dict[str, Any] = {"logits_to_keep": step.sample_index} if self._keeps_logits else {}
        try:
            logits: Tensor = self.model(
                input_ids=step.input_ids[None],
                position_ids=step.position_ids[None],
                use_cache=False,
                **keep,
            ).logits[0]
        finally:
            self.context.enter(None)
        return logits if self._keeps_logits else logits[step.sample_index]
