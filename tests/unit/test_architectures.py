"""Tiny random models of many classes: the engine computes them right or refuses them."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabatch.errors import UnsupportedModel
from lorabatch_kernels import native
from lorabatch_worker.adapters.weights import AdapterTarget, read_adapter
from lorabatch_worker.lora_layers import linear_shapes
from lorabatch_worker.model_runner import ModelRunner
from lorabatch_worker.probe import check_config
from tests.models import (
    as_base,
    eager,
    generate,
    load_with_peft,
    random_adapter,
    runner_of,
    tiny_config,
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
IGNORES_THE_INTERFACE = ["bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt", "rwkv", "xglm"]
RECURRENT = ["bamba", "falcon_h1", "jamba", "mamba", "minimax", "qwen3_next", "recurrent_gemma"]
# Shorter and longer than the sliding window (6), a block (8) and a chunk.
PROMPTS = [
    torch.randint(3, 250, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (1, 5, 8, 41)
]
NEW = 4


def small_vocabulary(kind: str, **fields: Any) -> Any:
    """Configurations differ in what they call the end tokens; none lies outside of the model."""
    return tiny_config(kind, **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | fields)


def assert_same_logits(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4 * max(1.0, wanted.std().item()))


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


def load(runner: ModelRunner, folder: Path, slot: int) -> set[str]:
    """Put an adapter's files into a slot: the layers that it changes."""
    target = AdapterTarget(
        base_names=frozenset({"acme/tiny"}),
        shapes={n: (s.in_features, s.out_features) for n, s in runner.sites.items()},
        modules=frozenset(),
        max_rank=8,
        dtype=torch.float32,
    )
    sites = read_adapter("x", folder, target).sites
    for name, weights in sites.items():
        runner.sites[name].load(slot, weights.a, weights.b, weights.scale)
    return set(sites)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "phi3", "gpt_neox", "qwen2_moe"])
def test_mixed_adapters_equal_peft(kind: str, tmp_path: Path) -> None:
    model = tiny_model(small_vocabulary(kind))
    references: list[Any] = [copy.deepcopy(model) for _ in range(3)]
    fields: tuple[dict[str, Any], ...] = ({"r": 8}, {"r": 3, "use_rslora": True})
    runner = runner_of(model)
    for slot, extra in enumerate(fields):
        folder = random_adapter(references[2], tmp_path / str(slot), slot, **extra)
        assert load(runner, folder, slot) == set(runner.sites)
        references[slot] = load_with_peft(references[slot], folder)
    slots = [0, 1, -1, 0]
    found = generate(runner, PROMPTS, slots, NEW, 7)
    for prompt, slot, logits in zip(PROMPTS, slots, found, strict=True):
        tokens = logits.argmax(-1).tolist()
        assert_same_logits(logits, eager(references[slot], prompt, tokens))
        if slot >= 0:
            plain = eager(references[2], prompt, tokens)
            assert (logits - plain).abs().max() > 0.05 * plain.std()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gemma2"])
def test_layers_of_the_llama_kind_are_fused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"hidden_act": "silu"} if kind != "gemma2" else {}
    if kind in ("mistral", "qwen2"):
        fields |= {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}
    model = tiny_model(small_vocabulary(kind, **fields))
    layers = model.config.num_hidden_layers
    paged = runner_of(copy.deepcopy(model), rows=False)
    fused = runner_of(copy.deepcopy(model))
    assert fused.fused_layers == (0 if kind == "gemma2" else layers)
    monkeypatch.setattr(native, "library", lambda: None)
    without = runner_of(model)
    assert without.fused_layers == 0
    wanted = generate(without, PROMPTS, [-1] * 4, NEW, 7)
    monkeypatch.undo()
    for runner in (paged, fused):
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


# -- refused ------------------------------------------------------------------


def refused(kind: str, **fields: Any) -> str:
    with pytest.raises(UnsupportedModel) as caught:
        runner_of(tiny_model(small_vocabulary(kind, **fields)))
    return str(caught.value)


@pytest.mark.parametrize("kind", IGNORES_THE_INTERFACE)
def test_classes_with_attention_of_their_own_are_refused(kind: str) -> None:
    layers = {"num_hidden_layers": 2, "num_layers": 2, "n_layers": 2, "n_layer": 2}
    known = tiny_config(kind).to_dict()
    fields = {k: v for k, v in layers.items() if k in known}
    if kind == "gpt_neo":
        fields["attention_types"] = [[["global"], 2]]
    message = refused(kind, **fields)
    assert "0 attention calls" in message
    assert "does not use transformers' attention interface" in message


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_models_are_refused(kind: str) -> None:
    with pytest.raises(UnsupportedModel, match="layers of type (linear_attention|hybrid)"):
        check_config(tiny_config(kind))


@pytest.mark.parametrize("kind", ["t5", "bart", "mbart"])
def test_encoder_decoders_are_refused(kind: str) -> None:
    with pytest.raises(UnsupportedModel, match="an encoder-decoder model"):
        check_config(tiny_config(kind))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_looks_at_the_longest_in_the_batch_is_refused(kind: str) -> None:
    rope = {
        "rope_type": kind,
        "rope_theta": 1e4,
        "factor": 2.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 128,
    }
    message = refused("llama", rope_parameters=rope)
    assert f"RoPE type '{kind}'" in message
    assert "one job would change another's tokens" in message


def test_such_rope_of_one_kind_of_layer_is_refused() -> None:
    rope = {
        "full_attention": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    with pytest.raises(UnsupportedModel, match="RoPE type 'dynamic'"):
        check_config(tiny_config("gemma3_text", rope_parameters=rope))


def test_such_rope_of_a_nested_text_model_is_refused() -> None:
    inner = SimpleNamespace(rope_parameters={"rope_type": "dynamic"}, layer_types=None)
    outer = SimpleNamespace(get_text_config=lambda: inner, is_encoder_decoder=False)
    with pytest.raises(UnsupportedModel, match="RoPE type 'dynamic'"):
        check_config(outer)


def test_chunked_attention_is_refused() -> None:
    config = tiny_config("llama")
    config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(UnsupportedModel, match="layers of type chunked_attention"):
        check_config(config)


class Shifted(nn.Module):
    """Attention that looks right, but adds what the engine does not know of."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, **rest: Any) -> Any:
        out, weights = self.inner(hidden_states, **rest)
        return out + hidden_states.mean(dim=1, keepdim=True), weights


def test_a_layer_that_mixes_tokens_outside_of_attention_is_refused() -> None:
    model = tiny_model(small_vocabulary("llama"))
    model.model.layers[2].self_attn = Shifted(model.model.layers[2].self_attn)
    with pytest.raises(UnsupportedModel, match="packed logits differ from eager attention by"):
        runner_of(model)


def test_a_model_that_cannot_take_a_packed_step_is_refused_with_its_error() -> None:
    model = tiny_model(small_vocabulary("llama"))
    model.model.layers[0].forward = lambda *a, **k: 1 / 0
    with pytest.raises(UnsupportedModel, match="a first step failed: ZeroDivisionError"):
        ModelRunner(as_base(model), 1024, 8, 2, 4)


def test_adapters_may_change_linear_layers_but_not_the_head_or_a_router() -> None:
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
    }
