"""The one good adapter that the bad ones are made from, and the layers that it is for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorabatch_worker.adapters.base_tokenizer import BaseTokenizer
from lorabatch_worker.adapters.vocabulary import Ends
from lorabatch_worker.adapters.weights import AdapterTarget
from tests.added_tokens import word_tokenizer

WIDTH, NARROW, RANK, VOCABULARY = 32, 16, 4, 9
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"


class Layer:
    """Of the base model: a unit matrix and no bias."""

    bias = None

    def __init__(self, fan_in: int, fan_out: int) -> None:
        self.out_features = fan_out
        self._weight = torch.eye(fan_out, fan_in)

    def weight_blocks(self) -> Iterator[Tensor]:
        yield self._weight


TARGET = AdapterTarget(
    base_names=frozenset({"acme/tiny"}),
    shapes={Q: (WIDTH, WIDTH), V: (WIDTH, NARROW)},
    modules=frozenset({Q, V, "lm_head", "model.embed_tokens", "model.norm"}),
    max_rank=8,
    dtype=torch.float32,
    layer=lambda name: Layer(*TARGET.shapes[name]),
    ends=Ends("model.embed_tokens", "lm_head", True, torch.ones(VOCABULARY, WIDTH)),
    tokenizer=BaseTokenizer(lambda: word_tokenizer(VOCABULARY)),
)
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "acme/tiny",
    "r": RANK,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "init_lora_weights": True,
}


def key(module: str, part: str) -> str:
    return f"{PREFIX}{module}.lora_{part}.weight"


def good_tensors(rank: int = RANK) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, (fan_in, fan_out) in TARGET.shapes.items():
        tensors[key(module, "A")] = torch.randn(rank, fan_in, generator=generator)
        tensors[key(module, "B")] = torch.randn(fan_out, rank, generator=generator)
    return tensors


def write(
    folder: Path,
    config: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    without: tuple[str, ...] = (),
) -> None:
    """A good adapter with `config` and `tensors` on top and the keys in `without` left out."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {k: v for k, v in {**CONFIG, **(config or {})}.items() if k not in without}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    kept = {k: t for k, t in {**good_tensors(), **(tensors or {})}.items() if k not in without}
    save_file(kept, folder / "adapter_model.safetensors")
