"""Models that the engine would compute wrong are refused, and say why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from lorabatch.errors import UnsupportedModel
from lorabatch_worker.model_runner import ModelRunner
from lorabatch_worker.probe import check_config
from tests.models import as_base, runner_of, small_vocabulary, tiny_config, tiny_model

IGNORES_THE_INTERFACE = ["bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt", "rwkv", "xglm"]
RECURRENT = ["bamba", "falcon_h1", "jamba", "mamba", "minimax", "qwen3_next", "recurrent_gemma"]


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
