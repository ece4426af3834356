"""The workload that engines are compared on: chat prompts, mixed adapters, fixed lengths.

64 prompts of 64 to 200 tokens, 32 new tokens each, greedy, end token ignored, neighbours seldom
of the same adapter. 32 random adapters of ranks 4, 8, 16 and 32 and three sets of target
modules. Deterministic.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANKS = (4, 8, 16, 32)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = (("q_proj", "v_proj"), ATTENTION, ATTENTION + MLP)
NOUNS = "river engine garden market library bridge harvest signal window forest kitchen".split()
VERBS = "describes repairs measures questions follows replaces observes collects".split()
KINDS = "quiet careful broken distant modern narrow patient hidden regular bright".split()


@dataclass(frozen=True)
class Request:
    """One prompt as token ids, and the adapter it asks for (None: the base model)."""

    ids: tuple[int, ...]
    adapter: str | None


def make_requests(
    tokenizer: Any, count: int, adapters: list[str], low: int = 64, high: int = 200
) -> list[Request]:
    """`count` requests, adapters in equal shares and shuffled."""
    rng = random.Random(7)
    prompts = [_prompt(tokenizer, rng, rng.randint(low, high)) for _ in range(count)]
    names = [adapters[i % len(adapters)] if adapters else None for i in range(count)]
    rng.shuffle(names)
    return [Request(tuple(ids), name) for ids, name in zip(prompts, names, strict=True)]


def read_requests(path: Path, key: str) -> list[Request]:
    """Requests that another program wrote: {key: [[ids, adapter], ...]}."""
    return [Request(tuple(ids), name) for ids, name in json.loads(path.read_text())[key]]


def _prompt(tokenizer: Any, rng: random.Random, length: int) -> list[int]:
    """A chat prompt of at least `length` tokens."""
    words: list[str] = []
    while True:
        words.append(
            f"The {rng.choice(KINDS)} {rng.choice(NOUNS)} {rng.choice(VERBS)} the "
            f"{rng.choice(KINDS)} {rng.choice(NOUNS)}."
        )
        chat = [{"role": "user", "content": "Continue this note. " + " ".join(words)}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= length:
            return ids


def write_adapters(config: Any, folder: Path, count: int) -> list[Path]:
    """Random adapters in PEFT's format, strong enough to change the text."""
    import torch
    from safetensors.torch import save_file

    shapes = _shapes(config)
    made = []
    for i in range(count):
        rank = RANKS[i % len(RANKS)]
        targets = TARGETS[(i // len(RANKS)) % len(TARGETS)]
        path = folder / f"r{rank}-{len(targets)}m-{i:02d}"
        made.append(path)
        if (path / "adapter_config.json").is_file():
            continue
        generator = torch.Generator().manual_seed(1000 + i)
        tensors = {}
        for layer in range(config.num_hidden_layers):
            for name in targets:
                fan_out, fan_in = shapes[name]
                block = "self_attn" if name in ATTENTION else "mlp"
                key = f"base_model.model.model.layers.{layer}.{block}.{name}"
                a = torch.randn(rank, fan_in, generator=generator) / fan_in**0.5
                b = torch.randn(fan_out, rank, generator=generator) * (0.05 / rank**0.5)
                tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / "adapter_model.safetensors")
        fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
        fields |= {"target_modules": list(targets), "task_type": "CAUSAL_LM"}
        (path / "adapter_config.json").write_text(json.dumps(fields))
    return made


def _shapes(config: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q, kv = head * config.num_attention_heads, head * config.num_key_value_heads
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {**attention, "o_proj": (hidden, q), **mlp}
