"""Adapter files: what PEFT writes is read as PEFT reads it; everything else is refused by name."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorabatch import errors
from lorabatch_worker.adapters.config import AdapterConfig, read_config
from lorabatch_worker.adapters.weights import AdapterTarget, read_adapter
from lorabatch_worker.linear import Dense
from lorabatch_worker.lora_layers import linear_shapes
from tests import bad_adapters
from tests.bad_adapters import BAD, Q, V, good_tensors, key, write
from tests.models import load_with_peft, with_lora


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


def dense(layer: Any) -> Dense:
    return Dense(layer.weight.detach(), layer.bias)


def target_of(model: Any, max_rank: int = 64) -> AdapterTarget:
    return AdapterTarget(
        base_names=frozenset({"acme/tiny"}),
        shapes=linear_shapes(model),
        modules=frozenset(name for name, _ in model.named_modules()),
        max_rank=max_rank,
        dtype=torch.float32,
        layer=lambda name: dense(model.get_submodule(name)),
    )


TOKENS = "trainable_tokens_delta"


# -- as PEFT reads it ---------------------------------------------------------

PATTERNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 5},
    "by name": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "rslora by name": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "down_proj": 7},
        "alpha_pattern": {"up_proj": 1, "q_proj": 9},
    },
    "one layer": {"rank_pattern": {"model.layers.1.self_attn.q_proj": 3, "q_proj": 6}},
    "first match of the file wins": {"alpha_pattern": {"up_proj": 6, r"layers\.1\..*": 3}},
    "ambiguous tails": {
        "rank_pattern": {".*mlp.*": 3, "down_proj": 9, "o_proj": 2, r"\d.self_attn.v_proj": 5},
        "alpha_pattern": {".*mlp.*": 4, "down_proj": 32, "self_attn.o_proj": 2.5},
    },
    "a tail starts at a dot": {"rank_pattern": {"_proj": 2, "ers.0.mlp.up_proj": 3, "q_proj": 5}},
    "dots match anything": {"alpha_pattern": {"mlp.up.proj": 6, "layers.0.self_attn.": 5}},
    "alternatives": {"rank_pattern": {"(q_proj|up_proj)": 2, "layers.0.mlp.gate_proj|v_proj": 3}},
    "anchored": {"rank_pattern": {"^model.layers.0.mlp.up_proj": 2, "^q_proj": 3}},
}
ignored = pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")


def write_with_peft(tiny: Any, folder: Path, fields: dict[str, Any]) -> None:
    every = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear"}
    tuned = with_lora(copy.deepcopy(tiny), **every | fields)
    tuned.save_pretrained(folder, save_embedding_layers=False)


@ignored
@pytest.mark.parametrize("fields", PATTERNS.values(), ids=PATTERNS)
def test_ranks_and_scalings_are_those_that_peft_loads(
    tiny: Any, fields: dict[str, Any], tmp_path: Path
) -> None:
    write_with_peft(tiny, tmp_path, fields)
    loaded = load_with_peft(copy.deepcopy(tiny), tmp_path)
    wanted = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in loaded.named_modules()
        if hasattr(module, "lora_A")
    }
    adapter = read_adapter("x", tmp_path, target_of(tiny))
    assert len(wanted) == 14
    assert {n: (s.a.shape[0], pytest.approx(s.scale)) for n, s in adapter.sites.items()} == wanted
    if "rank_pattern" in fields or "alpha_pattern" in fields:
        assert len(set(wanted.values())) > 1


@ignored
def test_a_pattern_that_saving_reordered_is_refused_as_peft_refuses_it(
    tiny: Any, tmp_path: Path
) -> None:
    """PEFT sorts keys when it saves, so that another one matches first than in training."""
    write_with_peft(
        tiny, tmp_path, {"rank_pattern": {"q_proj": 6, "model.layers.1.self_attn.q_proj": 3}}
    )
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_with_peft(copy.deepcopy(tiny), tmp_path)
    with pytest.raises(errors.InvalidAdapter, match=r"is \[6, 32\], wanted \[3, 32\]"):
        read_adapter("x", tmp_path, target_of(tiny))


def test_the_tensors_decide_which_layers_are_adapted(
    tiny: Any, tiny_adapters: dict[str, Path]
) -> None:
    adapter = read_adapter("one-layer", tiny_adapters["one-layer"], target_of(tiny))
    assert set(adapter.sites) == {
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.o_proj",
    }
    stored = load_file(tiny_adapters["one-layer"] / "adapter_model.safetensors")
    for name, site in adapter.sites.items():
        assert torch.equal(site.a, stored[key(name, "A")])
        assert torch.equal(site.b, stored[key(name, "B")])


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_inits_that_leave_the_base_model_alone_are_taken(init: Any, tmp_path: Path) -> None:
    write(tmp_path, {"init_lora_weights": init})
    assert set(read_adapter("x", tmp_path, bad_adapters.TARGET).sites) == {Q, V}


def test_every_default_of_the_installed_peft_is_known(tmp_path: Path) -> None:
    LoraConfig(r=3, task_type="CAUSAL_LM").save_pretrained(tmp_path)
    assert read_config(tmp_path / "adapter_config.json") == AdapterConfig(rank=3, alpha=8)


@pytest.mark.parametrize(
    "name", ["acme/tiny", "tiny", "/data/models/Tiny/", "other\\TINY", None, ""]
)
def test_names_of_the_same_base_model_are_taken(name: str | None, tmp_path: Path) -> None:
    write(tmp_path, {"base_model_name_or_path": name})
    assert read_adapter("x", tmp_path, bad_adapters.TARGET).rank_rows == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_dtypes_are_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    write(tmp_path, tensors={k: t.to(dtype) for k, t in good_tensors().items()})
    site = read_adapter("x", tmp_path, bad_adapters.TARGET).sites[Q]
    assert site.a.dtype == torch.float32
    assert torch.equal(site.a, good_tensors()[key(Q, "A")].to(dtype).float())


def test_keys_with_an_adapter_name_are_read(tmp_path: Path) -> None:
    named = {k.replace(".weight", ".default.weight"): t for k, t in good_tensors().items()}
    write(tmp_path, tensors=named, without=tuple(good_tensors()))
    assert set(read_adapter("x", tmp_path, bad_adapters.TARGET).sites) == {Q, V}


def test_the_version_is_that_of_the_content(tmp_path: Path) -> None:
    one, same, other, template = (tmp_path / n for n in ("one", "same", "other", "template"))
    for folder in (one, same, template):
        write(folder)
    write(other, {"lora_alpha": 9})
    (template / "chat_template.jinja").write_text("x")
    (same / "README.md").write_text("not part of the adapter")
    version = {
        f.name: read_adapter("x", f, bad_adapters.TARGET).version for f in tmp_path.iterdir()
    }
    assert version["one"] == version["same"]
    assert len(set(version.values())) == 3


def test_a_chat_template_comes_from_either_file(tmp_path: Path) -> None:
    write(tmp_path)
    assert read_adapter("x", tmp_path, bad_adapters.TARGET).chat_template is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old"}))
    assert read_adapter("x", tmp_path, bad_adapters.TARGET).chat_template == "old"
    (tmp_path / "chat_template.jinja").write_text("new é")
    assert read_adapter("x", tmp_path, bad_adapters.TARGET).chat_template == "new é"


@pytest.mark.timeout(60)
def test_hundreds_of_plain_names_as_patterns_are_taken(tmp_path: Path) -> None:
    """What EVA and AdaLoRA write: a rank for each layer."""
    ranks = {f"model.layers.{i}.self_attn.q_proj": 4 for i in range(2000)}
    write(tmp_path, {"rank_pattern": ranks, "alpha_pattern": ranks})
    config = read_config(tmp_path / "adapter_config.json")
    assert {config.rank_of(f"model.layers.{i}.mlp.up_proj") for i in range(20)} == {4}
    assert config.scaling_of("model.layers.1999.self_attn.q_proj") == 1.0


# -- refused ------------------------------------------------------------------


@pytest.mark.timeout(30)
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.what)
def test_bad_adapters_are_refused_by_name(bad: bad_adapters.Bad, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    bad.make(folder)
    with pytest.raises(errors.InvalidAdapter) as caught:
        read_adapter("mine", folder, bad_adapters.TARGET)
    assert type(caught.value) is bad.error
    message = str(caught.value)
    assert message.startswith("adapter 'mine': ")
    for word in bad.words:
        assert word in message
    assert str(tmp_path) not in message
    assert "\n" not in message
    assert len(message) < 1000


def test_what_the_table_is_made_from_is_a_good_adapter(tmp_path: Path) -> None:
    write(tmp_path)
    adapter = read_adapter("x", tmp_path, bad_adapters.TARGET)
    assert {n: s.scale for n, s in adapter.sites.items()} == {Q: 2.0, V: 2.0}
    assert len({bad.what for bad in BAD}) == len(BAD) >= 20


def test_a_file_that_may_not_be_read_is_an_error_of_the_adapter(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.unlink()
    os.symlink(path, path)  # to itself: no one can open it
    with pytest.raises(errors.InvalidAdapter, match=r"adapter_config\.json"):
        read_adapter("x", tmp_path, bad_adapters.TARGET)


@pytest.mark.parametrize("part", ["lm_head.weight", "model.embed_tokens.token_adapter."])
def test_other_rows_of_a_head_with_a_bias_are_refused(part: str, tmp_path: Path) -> None:
    """Of the head itself, or of the embedding that it is tied to."""
    ends = bad_adapters.TARGET.ends
    assert ends is not None
    rows, key = (len(ends.weight), part) if part.endswith("t") else (1, f"{part}{TOKENS}")
    tensors = {f"base_model.model.{key}": torch.ones(rows, ends.weight.shape[1])}
    write(tmp_path, {"trainable_token_indices": None if rows > 1 else [3]}, tensors)
    assert read_adapter("x", tmp_path, bad_adapters.TARGET).vocabulary is not None
    biased = replace(bad_adapters.TARGET, ends=replace(ends, head_has_bias=True))
    with pytest.raises(errors.UnsupportedAdapter, match="rows of lm_head, which has a bias"):
        read_adapter("x", tmp_path, biased)
