"""The command line through typer's runner, with an empty home, its ledger and a bulk file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lorabatch import Ledger, Settings
from lorabatch.database import open_database
from lorabatch_producer import services
from lorabatch_producer.cli import app
from tests.bad_inputs import CHAT, line, short
from tests.command_line import Cli


@pytest.fixture
def cli(home: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("LORABATCH_HOME", str(home))
    # nobody answers here: no need to wait the whole second for that
    monkeypatch.setattr(services, "PING_S", 0.05)
    monkeypatch.setattr(services.answering, "__defaults__", (0.05,))

    def run(*arguments: object, code: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    engine = open_database(settings)
    yield Ledger(engine)
    engine.dispose()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([line(body=CHAT), b"no json", short(adapter_id="broken")]))
    return path
