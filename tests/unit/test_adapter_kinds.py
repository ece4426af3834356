"""Every kind of adapter that PEFT writes, mixed in the same steps: logits and tokens are PEFT's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorabatch_worker.adapters.affine import affine_of, gain_of
from lorabatch_worker.linear import Dense
from tests.models import (
    assert_same_logits,
    eager,
    generate,
    load_adapter,
    load_with_peft,
    random_adapter,
    runner_of,
    small_vocabulary,
    tiny_model,
)

NEW = 5
PROMPTS = [[5, 9, 200, 31, 7], [8] * 13, [77, 3], list(range(40, 60)), [9, 10, 11], [12], [6, 6, 7]]
PROMPTS += [[90, 91, 4], [33] * 9]
ADAPTER_KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8},
    "rslora": {"r": 3, "use_rslora": True},
    "dora": {"r": 5, "use_dora": True},
    "dora, rslora": {"r": 2, "use_dora": True, "use_rslora": True},
    "head": {"r": 6, "target_modules": ["q_proj", "c_attn", "lm_head"]},
    "dora on the head": {"r": 4, "use_dora": True, "target_modules": ["lm_head"]},
    "lora_bias": {"r": 4, "lora_bias": True},
    "bias": {"r": 4, "bias": "lora_only"},
}


def assert_equals_peft(found: Tensor, references: list[Any]) -> None:
    """Logits and tokens of the first prompts; the first reference has no adapter, and each other
    one differs from it."""
    for prompt, reference, logits in zip(PROMPTS[: len(found)], references, found, strict=True):
        tokens = logits.argmax(-1).tolist()
        wanted = eager(reference, prompt, tokens)
        assert_same_logits(logits, wanted)
        assert tokens == wanted.argmax(-1).tolist()
        if reference is not references[0]:
            plain = eager(references[0], prompt, tokens)
            assert (wanted - plain).abs().max() > 0.05 * plain.std()


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "blocks"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2"])
def test_kinds_in_one_batch_equal_peft(kind: str, rows: bool, tmp_path: Path) -> None:
    model = tiny_model(small_vocabulary(kind))
    runner = runner_of(copy.deepcopy(model), slots=len(ADAPTER_KINDS), rows=rows)
    references: list[Any] = [copy.deepcopy(model)]
    for slot, (name, fields) in enumerate(ADAPTER_KINDS.items()):
        folder = random_adapter(model, tmp_path / name, slot, **fields)
        loaded = load_adapter(runner, folder, slot)
        assert ("lm_head" in loaded) == ("head" in name)
        assert "head" in name or loaded == set(runner.sites) - {"lm_head"}
        references.append(load_with_peft(copy.deepcopy(model), folder))
    slots = list(range(-1, len(ADAPTER_KINDS)))
    found = generate(runner, PROMPTS, slots, NEW, 7)
    assert_equals_peft(found, references)


ENDS: dict[str, dict[str, Any]] = {
    "embedding": {"r": 5, "target_modules": ["q_proj", "embed_tokens"]},
    "dora": {"r": 3, "target_modules": ["embed_tokens"], "use_dora": True},
    "with the base's weight": {"r": 3, "target_modules": ["embed_tokens"], "save_embedding": True},
    "tokens": {"trainable_token_indices": [200, 5, 9]},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "head": {"modules_to_save": ["lm_head"]},
}
UNTIED = {"tokens": {"trainable_token_indices": {"embed_tokens": [8, 9], "lm_head": [200, 7]}}}


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "blocks"])
@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", True), ("llama", False), ("gemma3_text", True)]
)
def test_changes_of_embedding_and_head_equal_peft(
    kind: str, tied: bool, rows: bool, tmp_path: Path
) -> None:
    model = tiny_model(small_vocabulary(kind, tie_word_embeddings=tied))
    runner = runner_of(copy.deepcopy(model), slots=len(ENDS), rows=rows)
    references: list[Any] = [copy.deepcopy(model)]
    kinds = ENDS | ({} if tied else UNTIED)
    for slot, (name, fields) in enumerate(kinds.items()):
        folder = random_adapter(model, tmp_path / name, slot, **fields)
        load_adapter(runner, folder, slot)
        references.append(load_with_peft(copy.deepcopy(model), folder))
    slots = list(range(-1, len(kinds)))
    found = generate(runner, PROMPTS[: len(slots)], slots, NEW, 7)
    assert_equals_peft(found, references)


def test_biases_of_layers_that_have_no_lora(tmp_path: Path) -> None:
    model = tiny_model(small_vocabulary("qwen2"))
    runner = runner_of(copy.deepcopy(model))
    folder = random_adapter(model, tmp_path, bias="all", target_modules=["o_proj"])
    assert {n.rpartition(".")[2] for n in load_adapter(runner, folder, 0)} == {
        "o_proj",
        "q_proj",
        "k_proj",
        "v_proj",
    }
    reference = load_with_peft(copy.deepcopy(model), folder)
    (logits,) = generate(runner, PROMPTS[:1], [0], NEW, 7)
    assert_same_logits(logits, eager(reference, PROMPTS[0], logits.argmax(-1).tolist()))


def test_bias_and_weight_of_each_layer_are_the_models() -> None:
    model = tiny_model(small_vocabulary("qwen2"))
    linears = {n: m for n, m in model.named_modules() if hasattr(m, "in_features")}
    wanted = {n: (m.weight.clone(), m.bias) for n, m in linears.items()}
    layers = runner_of(model).layers
    assert set(layers) == set(wanted)
    for name, layer in layers.items():
        weight, bias = wanted[name]
        assert torch.equal(torch.cat(list(layer.weight_blocks())), weight)
        assert (layer.bias is None) == (bias is None)
        assert bias is None or torch.equal(layer.bias, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_gain_is_not_lost_in_bf16(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Dense(torch.randn(64, 32).to(dtype), torch.randn(64).to(dtype) * 100)
    a, b = torch.randn(4, 32), torch.zeros(64, 4)
    plain = gain_of(Whole(layer), a, b, 1.0, torch.ones(64)) + 1
    gain = gain_of(Whole(layer), a, b, 1.0, 1.001 / plain)
    made = affine_of(Whole(layer), gain, None, None, dtype)
    assert made is not None
    torch.testing.assert_close(made[0], torch.full((64,), 0.001), rtol=1e-2, atol=0)
    assert layer.bias is not None
    left = (1 + made[0]) * layer.bias.float() + made[1]  # of the base's bias: all of it
    torch.testing.assert_close(left, layer.bias.float(), rtol=1e-6, atol=0)


class Whole:
    """A product as a layer of the base model."""

    def __init__(self, dense: Dense) -> None:
        self.bias, self.out_features = dense.bias, dense.out_features
        self._dense = dense

    def weight_blocks(self) -> Iterator[Tensor]:
        return self._dense.weight_blocks(0, self.out_features)
