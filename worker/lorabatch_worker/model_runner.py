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

from lorabatch_worker.attention import IMPLEMENTATION, KVCache, register
from lorabatch_worker.base_model import BaseModel
from lorabatch_worker.block_manager import BlockManager
from lorabatch_worker.lora_layers import attach_sites
from lorabatch_worker.probe import PROBE_BLOCKS, check_attention, check_config
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
    ) -> None:
        check_config(base.model.config)
        self.base = base
        self.model: Any = base.model
        self.device = base.device
        self.context = StepContext()
        blocks = max(-(-kv_cache_tokens // block_size), PROBE_BLOCKS)
        self.blocks = BlockManager(1 + blocks, block_size)
        self.cache = KVCache(self.blocks.num_blocks, block_size, self.context)
        name = f"{IMPLEMENTATION}_{id(self.cache)}"
        register(self.cache, name)
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.sites = attach_sites(self.model, self.context, adapter_slots, max_adapter_rank)
        check_attention(self, name)

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk]) -> Tensor:
        """Compute a plan's chunks: logits [n, vocabulary] of the n chunks that sample."""
        step = build_step(chunks, self.blocks.block_size, self.device)
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
