"""Tiny random models of many classes: the engine computes them as transformers and PEFT do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabatch_kernels import PackedWeight, native
from lorabatch_worker.lora_layers import linear_shapes
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

MLA = {
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 12,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
SUPPORTED: dict[str, dict[str, Any]] = {
    "arcee": {},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "ernie4_5": {},
    "exaone4": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "glm": {},
    "glm4": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "granite": {},
    "granitemoe": {},
    "helium": {},
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {},
    "opt": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}
# Shorter and longer than the sliding window (6), a block (8) and a chunk.
PROMPTS = [
    torch.randint(3, 250, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (1, 5, 8, 41)
]
NEW = 4


@pytest.mark.parametrize("kind", SUPPORTED)
def test_packed_steps_equal_eager_attention(kind: str) -> None:
    model = tiny_model(small_vocabulary(kind, **SUPPORTED[kind]))
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    runner = runner_of(model)
    for chunk in (7, 64):
        found = generate(runner, PROMPTS, [-1] * len(PROMPTS), NEW, chunk)
        for prompt, logits in zip(PROMPTS, found, strict=True):
            assert_same_logits(logits, eager(reference, prompt, logits.argmax(-1).tolist()))


@pytest.mark.parametrize(
    "kind", ["cohere2", "deepseek_v3", "gemma2", "gpt2", "gpt_bigcode", "gpt_oss", "qwen2_moe"]
)
def test_blocks_that_lie_anywhere_equal_eager_attention(kind: str) -> None:
    """Windows, softcap, sinks, one key-value head, values narrower than keys."""
    model = tiny_model(small_vocabulary(kind, **SUPPORTED[kind]))
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    found = generate(runner_of(model, rows=False), PROMPTS, [-1] * len(PROMPTS), NEW, 7)
    for prompt, logits in zip(PROMPTS, found, strict=True):
        assert_same_logits(logits, eager(reference, prompt, logits.argmax(-1).tolist()))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "phi3", "gpt_neox", "qwen2_moe"])
def test_mixed_adapters_equal_peft(kind: str, tmp_path: Path) -> None:
    model = tiny_model(small_vocabulary(kind))
    references: list[Any] = [copy.deepcopy(model) for _ in range(3)]
    fields: tuple[dict[str, Any], ...] = ({"r": 8}, {"r": 3, "use_rslora": True})
    runner = runner_of(model)
    for slot, extra in enumerate(fields):
        folder = random_adapter(references[2], tmp_path / str(slot), slot, **extra)
        assert load_adapter(runner, folder, slot) == set(runner.sites) - {"lm_head", "embed_out"}
        references[slot] = load_with_peft(references[slot], folder)
    slots = [0, 1, -1, 0]
    found = generate(runner, PROMPTS, slots, NEW, 7)
    for prompt, slot, logits in zip(PROMPTS, slots, found, strict=True):
        tokens = logits.argmax(-1).tolist()
        assert_same_logits(logits, eager(references[slot], prompt, tokens))
        if slot >= 0:
            plain = eager(references[2], prompt, tokens)
            assert (logits - plain).abs().max() > 0.05 * plain.std()


def test_layers_of_different_sizes_are_not_put_into_one_call() -> None:
    model = tiny_model(small_vocabulary("llama", hidden_act="silu"))
    wider = copy.deepcopy(model.config)
    wider.intermediate_size = 2 * model.config.intermediate_size
    model.model.layers[1].mlp = type(model.model.layers[1].mlp)(wider)
    runner = runner_of(model)
    assert (runner.fused.count, runner.fused.compiled) == (model.config.num_hidden_layers, 0)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gemma2"])
def test_layers_of_the_llama_kind_are_fused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"hidden_act": "silu"} if kind != "gemma2" else {}
    if kind in ("mistral", "qwen2"):
        fields |= {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}
    model = tiny_model(small_vocabulary(kind, **fields))
    layers = model.config.num_hidden_layers
    wanted_count = 0 if kind == "gemma2" else layers
    paged = runner_of(copy.deepcopy(model), rows=False)
    assert (paged.fused.count, paged.fused.compiled) == (wanted_count, 0)
    whole = runner_of(copy.deepcopy(model))
    assert (whole.fused.count, whole.fused.compiled) == (wanted_count, wanted_count)
    assert (whole.direct is None) == (kind == "gemma2")
    wrapped = runner_of(copy.deepcopy(model))
    wrapped.direct = None
    monkeypatch.setattr(PackedWeight, "can_pack", lambda weight: False)
    apart = runner_of(copy.deepcopy(model))
    assert (apart.fused.count, apart.fused.compiled) == (wanted_count, 0)
    monkeypatch.setattr(native, "library", lambda: None)
    without = runner_of(model)
    assert without.fused.count == 0
    wanted = generate(without, PROMPTS, [-1] * 4, NEW, 7)
    monkeypatch.undo()
    assert paged.direct is apart.direct is None
    for runner in (paged, whole, wrapped, apart):
        assert_same_logits(generate(runner, PROMPTS, [-1] * 4, NEW, 7), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_the_probe(dtype: torch.dtype) -> None:
    runner = runner_of(tiny_model(small_vocabulary("llama")).to(dtype))
    assert generate(runner, PROMPTS, [-1] * 4, 2, 7).dtype == dtype


@pytest.mark.parametrize("rope", [YARN, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}])
def test_rope_of_fixed_frequencies_is_computed(rope: dict[str, Any]) -> None:
    model = tiny_model(small_vocabulary("llama", rope_parameters=rope))
    reference = copy.deepcopy(model)
    found = generate(runner_of(model), PROMPTS, [-1] * 4, NEW, 7)
    for prompt, logits in zip(PROMPTS, found, strict=True):
        assert_same_logits(logits, eager(reference, prompt, logits.argmax(-1).tolist()))


def test_adapters_may_change_linear_layers_and_the_head_but_not_a_router() -> None:
    class Router(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).softmax(-1)

    model = tiny_model(small_vocabulary("llama", num_hidden_layers=1))
    model.model.layers[0].mlp.router = Router(4, 4)
    assert linear_shapes(model) == {
        "model.layers.0.self_attn.q_proj": (64, 64),
        "model.layers.0.self_attn.k_proj": (64, 32),
        "model.layers.0.self_attn.v_proj": (64, 32),
        "model.layers.0.self_attn.o_proj": (64, 64),
        "model.layers.0.mlp.gate_proj": (64, 96),
        "model.layers.0.mlp.up_proj": (64, 96),
        "model.layers.0.mlp.down_proj": (96, 64),
        "lm_head": (64, 256),
    }
