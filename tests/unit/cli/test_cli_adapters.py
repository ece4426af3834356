"""`lorabatch adapters check`: the verdict that a worker would give, and its exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command_line import Cli

ENDS = ("embedding", "tokens", "whole-head")
Check = Callable[..., list[str]]


@pytest.fixture
def check(cli: Cli, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Run it on the tiny base model: lines of stdout."""
    monkeypatch.setenv("LORABATCH_BASE_MODEL", str(tiny_folder))
    monkeypatch.setenv("LORABATCH_BASE_MODEL_ALIASES", "acme/tiny")
    monkeypatch.setenv("LORABATCH_DTYPE", "float32")
    return lambda *given, code=0: cli("adapters", "check", *given, code=code).stdout.splitlines()


def test_adapters_that_fit(check: Check, tiny_adapters: dict[str, Path]) -> None:
    lines = dict(zip(tiny_adapters, check(*tiny_adapters.values()), strict=True))
    for name, line in lines.items():
        assert line.startswith("fits ")
        assert f"adapter {name!r}" in line
        assert "version " in line
        assert ("embedding or output head" in line) == (name in ENDS)
        assert "WARNING" not in line
    assert "2 q_proj, 2 v_proj (ranks 1 to 1)" in lines["attention"]


def test_each_that_does_not_fit_is_named_and_the_others_are_looked_at(
    check: Check, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    folders = tmp_path / "nothing", tiny_adapters["all"], tiny_adapters["dora"]
    nothing, too_large, fits = check("--max-adapter-rank", 4, *folders, code=1)
    assert nothing.startswith("refused: adapter 'nothing': adapter_config.json is missing")
    assert too_large.startswith("refused: adapter 'all': ")
    assert "allowed 4" in too_large
    assert fits.startswith("fits ")


def test_an_adapter_that_changes_nothing_is_said_to(
    check: Check, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    source, config = tiny_adapters["all"], "adapter_config.json"
    (tmp_path / config).write_text((source / config).read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    idle = {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in tensors.items()}
    save_file(idle, tmp_path / "adapter_model.safetensors")
    (line,) = check(tmp_path)
    assert "WARNING: it changes nothing" in line


@pytest.mark.parametrize(
    ("length", "words"),
    [(128, "a job here may have 512"), (1024, "the base model for 512"), (512, ""), (10**30, "")],
)
def test_an_adapter_for_texts_of_another_length_is_said_to_be(
    length: int, words: str, check: Check, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_adapters["all"], tmp_path / "long"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": length}))
    (line,) = check(folder)
    assert words in line
    assert ("WARNING: it says that it is meant for texts of" in line) == bool(words)
