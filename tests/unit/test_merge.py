"""Merged adapters: a, b and logits are PEFT's; what DARE drops is always the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorabatch.errors import InvalidAdapter, UnsupportedAdapter
from lorabatch.job import MergedAdapters
from lorabatch_kernels.weights import Arena
from lorabatch_worker.adapters.defaults import GenerationDefaults
from lorabatch_worker.adapters.merge import kept_at_random, merge
from lorabatch_worker.adapters.weights import Adapter, AdapterTarget, read_adapter
from tests.added_tokens import word_tokenizer
from tests.models import (
    assert_same_logits,
    eager,
    generate,
    quiet_peft,
    random_adapter,
    runner_of,
    small_vocabulary,
    tiny_model,
)

KINDS: dict[str, dict[str, Any]] = {
    "one": {"lora_alpha": 8},
    "two": {"lora_alpha": 3, "use_rslora": True},
    "three": {"target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"q_proj": 20}},
}
IDS = tuple(KINDS)
PROMPT = [5, 9, 200, 31, 7]
MODEL = tiny_model(small_vocabulary("llama", num_hidden_layers=2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [random_adapter(MODEL, root / n, i, **f) for i, (n, f) in enumerate(KINDS.items())]


@pytest.fixture
def adapters(folders: list[Path]) -> list[Adapter]:
    return [read(folder) for folder in folders]


def read(folder: Path, dtype: torch.dtype = torch.float32) -> Adapter:
    runner = runner_of(copy.deepcopy(MODEL))
    shapes = {n: (s.in_features, s.out_features) for n, s in runner.sites.items()}
    base = frozenset({"acme/tiny"})
    target = AdapterTarget(
        base, shapes, frozenset(), 8, dtype, runner.layers.__getitem__, runner.ends
    )
    return read_adapter(folder.name, folder, target)


def spec_of(strategy: str, weights: Sequence[float] = (), **fields: Any) -> MergedAdapters:
    given = {"ids": IDS, "weights": tuple(weights), "merge_strategy": strategy, **fields}
    return MergedAdapters.model_validate(given)


def merge_with_peft(folders: list[Path], spec: MergedAdapters) -> Any:
    from peft import PeftModel

    with quiet_peft(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density 1.0 is greater")
        tuned: Any = PeftModel.from_pretrained(copy.deepcopy(MODEL), folders[0], "one")
        for folder in folders[1:]:
            tuned.load_adapter(folder, folder.name)
        tuned.add_weighted_adapter(
            list(spec.ids),
            list(spec.weights),
            "merged",
            combination_type=spec.merge_strategy,
            density=spec.density,
            majority_sign_method=spec.majority_sign_method or "total",
        )
        tuned.set_adapter("merged")
    return tuned.eval()


def assert_is_pefts(found: Adapter, tuned: Any) -> None:
    """a, b and what they make, of every layer."""
    layers = {n.removeprefix("base_model.model."): m for n, m in tuned.named_modules()}
    wanted = {n: m for n, m in layers.items() if "merged" in getattr(m, "lora_A", {})}
    assert set(found.sites) == set(wanted)
    for module, site in found.sites.items():
        layer = wanted[module]
        assert site.scale == layer.scaling["merged"] == 1.0
        assert_close(site.a, layer.lora_A["merged"].weight.data)
        assert_close(site.b, layer.lora_B["merged"].weight.data)
        assert_close(site.b @ site.a * site.scale, layer.get_delta_weight("merged").detach())


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [(), (0.5, 2, 0.25), (1.0, -0.7, 0.0), (-1, -2, 0.5)])
def test_linear_is_pefts(
    weights: Sequence[float], adapters: list[Adapter], folders: list[Path]
) -> None:
    spec = spec_of("linear", weights)
    assert_is_pefts(merge("m", adapters, spec), merge_with_peft(folders, spec))


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.77, 1.0])
@pytest.mark.parametrize("weights", [(), (0.5, 2, 1.5), (1.0, -0.7, 0.3)])
def test_ties_is_pefts(
    weights: Sequence[float],
    density: float,
    method: str,
    adapters: list[Adapter],
    folders: list[Path],
) -> None:
    spec = spec_of("ties", weights, density=density, majority_sign_method=method)
    assert_is_pefts(merge("m", adapters, spec), merge_with_peft(folders, spec))


@pytest.mark.parametrize("strategy", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize(("density", "weights"), [(0.3, (0.5, 2, -0.4)), (1.0, ())])
def test_dare_is_pefts_where_both_drop_the_same(
    strategy: str,
    density: float,
    weights: Sequence[float],
    adapters: list[Adapter],
    folders: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = spec_of(strategy, weights, density=density)
    found = merge("m", adapters, spec)
    linears = [n for n, _ in MODEL.named_modules() if n in found.sites]  # in PEFT's order
    draws = (
        kept_at_random(site.a if part == "a" else site.b.t(), density, f"{label}/{part}")
        for module in linears
        for part in "ab"
        for adapter in adapters
        if (site := adapter.sites.get(module))
        for label in [f"{found.version}/{module}/{adapter.adapter_id}"]
    )

    def bernoulli(chances: Tensor) -> Tensor:
        kept = next(draws)
        return (kept if kept.shape == chances.shape else kept.t()).float()

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    assert_is_pefts(found, merge_with_peft(folders, spec))
    assert density == 1.0 or next(draws, None) is None


def test_the_engine_with_a_merge_gives_pefts_tokens(
    adapters: list[Adapter], folders: list[Path]
) -> None:
    spec = spec_of("ties", (1.5, 0.8, -0.5), density=0.5)
    runner = runner_of(copy.deepcopy(MODEL))
    for name, site in merge("m", adapters, spec).sites.items():
        runner.sites[name].put(0, site)
    logits = generate(runner, [PROMPT, PROMPT], [0, -1], 5, 7)
    tokens = logits[0].argmax(-1).tolist()
    assert_same_logits(logits[0], eager(merge_with_peft(folders, spec), PROMPT, tokens))
    assert (logits[0] - logits[1]).abs().max() > 0.05 * logits[1].std()


def test_rslora_in_front_scales_no_result(adapters: list[Adapter], folders: list[Path]) -> None:
    """PEFT keeps the first adapter's use_rslora, and so scales the result by sqrt(rank)."""
    spec = spec_of("linear", ids=("two", "one"))
    peft = merge_with_peft(folders, spec)
    module = "model.layers.0.mlp.up_proj"
    layer = peft.get_submodule(f"base_model.model.{module}")
    site = merge("m", [adapters[1], adapters[0]], spec).sites[module]
    assert (site.scale, layer.scaling["merged"]) == (1.0, 2.0)
    assert_close(site.a, layer.lora_A["merged"].weight.data)
    assert_close(site.b, layer.lora_B["merged"].weight.data)


@pytest.mark.parametrize("strategy", ["dare_linear", "dare_ties"])
def test_the_same_merge_drops_the_same(strategy: str, adapters: list[Adapter]) -> None:
    spec = spec_of(strategy, density=0.4)
    state = torch.get_rng_state()
    found, again = merge("m", adapters, spec), merge("n", adapters, spec)
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.adapter_id, again.adapter_id, found.version) == ("m", "n", again.version)
    for module, site in found.sites.items():
        assert torch.equal(site.a, again.sites[module].a)
        assert torch.equal(site.b, again.sites[module].b)
    changed = [adapters[0], adapters[1], replace(adapters[2], version="other files")]
    other = merge("m", changed, spec)
    assert other.version != found.version
    module = "model.layers.0.mlp.up_proj"
    assert not torch.equal(other.sites[module].a, found.sites[module].a)


@pytest.mark.parametrize("strategy", ["linear", "ties", "dare_ties"])
def test_weights_are_as_the_engine_wants_them(strategy: str, folders: list[Path]) -> None:
    adapters = [read(folder, torch.bfloat16) for folder in folders]
    found = merge("m", adapters, spec_of(strategy, density=0.5))
    assert (found.nbytes, found.rank_rows) == (adapters[0].nbytes, 4)
    for module, site in found.sites.items():
        like = adapters[0].sites[module]
        assert (site.dtype, site.paneled) == (torch.bfloat16, like.paneled)
        assert (site.a.shape, site.b.shape) == (like.a.shape, like.b.shape)
    assert len({site.memory.data_ptr() for site in found.sites.values()}) == 1


def test_a_merge_is_pinned_as_its_adapters_are(
    adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    def arena(*args: Any, pinned: bool, paneled: bool) -> Arena:
        asked.append((pinned, paneled))
        return Arena(*args, paneled=paneled)

    asked: list[tuple[bool, bool]] = []
    monkeypatch.setattr(Tensor, "is_pinned", lambda self: True)
    monkeypatch.setattr("lorabatch_worker.adapters.merge.Arena", arena)
    merge("m", adapters, spec_of("linear"))
    assert asked == [(True, adapters[0].sites["model.layers.0.mlp.up_proj"].paneled)]


def test_a_template_is_kept_where_all_have_it(adapters: list[Adapter]) -> None:
    def merged(*templates: str | None) -> str | None:
        made = [replace(a, chat_template=t) for a, t in zip(adapters, templates, strict=True)]
        return merge("m", made, spec_of("linear")).chat_template

    assert merged("x", "x", "x") == "x"
    assert merged("x", "x", "y") is None
    assert merged("x", "x", None) is None
    assert merged(None, None, None) is None


def test_defaults_are_kept_where_all_have_them(adapters: list[Adapter]) -> None:
    cold, warm = ({"temperature": value} for value in (0.2, 0.7))
    for params, wanted in (((cold, cold, dict(cold)), cold), ((cold, cold, warm), None)):
        pairs = zip(adapters, params, strict=True)
        made = [replace(a, defaults=GenerationDefaults(p)) for a, p in pairs]
        found = merge("m", made, spec_of("linear")).defaults
        assert (found and found.params) == wanted
    assert merge("m", [made[0], *adapters[1:]], spec_of("linear")).defaults is None


def test_the_version_is_of_request_and_adapters(adapters: list[Adapter]) -> None:
    plain = merge("m", adapters, spec_of("linear")).version
    assert len(plain) == 64
    assert merge("m", adapters, spec_of("linear", (1, 1, 1), density=0.5)).version == plain
    assert merge("m", adapters, spec_of("linear", (1, 1, 2))).version != plain
    turned = merge("m", adapters[::-1], spec_of("linear", ids=IDS[::-1]))
    assert turned.version != plain
    known_as_others = [replace(adapter, adapter_id="x") for adapter in adapters]
    assert merge("m", known_as_others, spec_of("linear")).version == plain


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA, lora_bias or bias on model.layers.0."),
    "lora_bias": ({"lora_bias": True}, "DoRA, lora_bias or bias on model.layers.0."),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "an embedding or output head"),
    "head": ({"modules_to_save": ["lm_head"]}, "an embedding or output head of its own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_named(name: str, adapters: list[Adapter], tmp_path: Path) -> None:
    fields, has = REFUSED[name]
    other = read(random_adapter(MODEL, tmp_path / name, **fields))
    spec = spec_of("linear", ids=("one", name))
    with pytest.raises(UnsupportedAdapter) as caught:
        merge("merged/1", [adapters[0], other], spec)
    assert str(caught.value).startswith(f"merged/1: adapter '{name}' has {has}")
    assert "cannot be merged; leave it out" in str(caught.value)


def test_added_tokens_are_named(adapters: list[Adapter]) -> None:
    other = replace(adapters[1], tokenizer=word_tokenizer(3))
    with pytest.raises(UnsupportedAdapter, match="adapter 'two' has tokens of its own"):
        merge("m", [adapters[0], other], spec_of("linear", ids=("one", "two")))


def test_unequal_ranks_are_named(adapters: list[Adapter], tmp_path: Path) -> None:
    other = read(random_adapter(MODEL, tmp_path / "wide", r=8, target_modules=["up_proj"]))
    with pytest.raises(InvalidAdapter) as caught:
        merge("merged/1", [adapters[0], other], spec_of("linear", ids=("one", "wide")))
    assert str(caught.value) == (
        "merged/1: model.layers.0.mlp.up_proj has ranks 4 of 'one', 8 of 'wide'; wanted the same "
        "rank of all that are merged"
    )
    apart = merge("m", [adapters[2], other], spec_of("linear", ids=("three", "wide")))
    assert {site.a.shape[0] for site in apart.sites.values()} == {4, 8}


def test_a_weight_beyond_all_numbers_is_refused(adapters: list[Adapter]) -> None:
    with pytest.raises(InvalidAdapter, match="NaN or infinite merged"):
        merge("m", adapters, spec_of("linear", (1e300, 1, 1)))
