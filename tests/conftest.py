"""Real servers for the tests, an embedded Valkey and a PostgreSQL from their wheels, and a tiny
model with adapters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from transformers import AutoModelForCausalLM

from lorabatch import Ledger, Settings
from lorabatch.database import connect, open_database, upgrade
from lorabatch.embedded import ensure_valkey, stop_valkey
from tests.models import checkpoint, random_adapter
from tests.postgres import drop_database, fresh_database, postgres


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("LORABATCH_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a PostgreSQL server's maintenance database."""
    with postgres() as url:
        yield url


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """URL of a fresh, empty PostgreSQL database."""
    url = fresh_database(postgres_server)
    yield url
    drop_database(postgres_server, url)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """An empty LORABATCH_HOME; a Valkey that the test started there is stopped at the end."""
    folder = tmp_path / "home"
    folder.mkdir()
    yield folder
    stop_valkey(folder)


@pytest.fixture
def settings(home: Path) -> Settings:
    """Embedded defaults in a fresh home."""
    return Settings.load(home=home)


@pytest.fixture
def valkey_url(home: Path) -> str:
    return ensure_valkey(home)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, settings: Settings) -> Iterator[sa.Engine]:
    """An upgraded, empty database of each kind."""
    if request.param == "sqlite":
        engine = open_database(settings)
    else:
        url = request.getfixturevalue("postgres_url")
        upgrade(url)
        engine = connect(url)
    yield engine
    engine.dispose()


@pytest.fixture
def ledger(database: sa.Engine) -> Ledger:
    return Ledger(database)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of two layers."""
    torch.set_num_threads(1)
    return checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_adapters(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that PEFT wrote for the tiny model: other ranks, layers and scalings."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("adapters")
    fields: dict[str, dict[str, Any]] = {
        "all": {"r": 8, "lora_alpha": 16},
        "rslora": {"r": 3, "lora_alpha": 4, "use_rslora": True},
        "attention": {"r": 1, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]},
        "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 20}},
        "dora": {"r": 3, "use_dora": True},
        "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
        "tokens": {"trainable_token_indices": list(range(3, 3000, 3))},
        "head": {"target_modules": ["v_proj", "lm_head"]},
        "whole-head": {"modules_to_save": ["lm_head"]},
        "one-layer": {"layers_to_transform": [1], "target_modules": ["up_proj", "o_proj"]},
    }
    return {
        name: random_adapter(model, folder / name, seed, **extra)
        for seed, (name, extra) in enumerate(fields.items())
    }
