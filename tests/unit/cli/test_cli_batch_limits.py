"""Batches that stop at a limit by the command line, watched and resumed without their file."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lorabatch import Ledger, Settings
from lorabatch.stopping import stop_exhausted
from lorabatch_producer import Producer, watching
from tests.command_line import Cli
from tests.played_worker import run_queued, working

PROGRAM = [sys.executable, "-W", "error", "-m", "lorabatch_producer.cli"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "in.csv"
    path.write_text("question,model\n" + "".join(f"q{n},sql\n" for n in range(6)))
    return path


def submitted(cli: Cli, table: Path, *more: object) -> str:
    columns = ("--prompt-column", "question", "--adapter-column", "model")
    return str(cli("batch", "submit", table, *columns, *more).stdout.split()[1])


def test_a_batch_stops_and_goes_on_without_its_file(
    cli: Cli, ledger: Ledger, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "PAUSE_S", 0.01)
    batch_id = submitted(cli, table, "--max-tokens-total", 8)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Ledger, "claim", _one_at_a_time(Ledger.claim))
        run_queued(ledger)
    stop_exhausted(ledger.engine)
    assert "stopped: 8 tokens are spent, and 8 may be" in cli("batch", "status", batch_id).stdout
    seen = cli("batch", "watch", batch_id, code=1)
    assert "6/6 done, 0 failed, 5 cancelled" in seen.stdout
    assert "8 of 8 tokens spent, stopped: 8 tokens" in seen.stdout
    columns = ("--prompt-column", "question", "--adapter-column", "model")
    refused = cli("batch", "submit", table, *columns, code=2)
    assert f"lorabatch batch resume {batch_id} --max-tokens-total N" in refused.stderr
    table.unlink()
    assert "8 tokens are spent" in cli("batch", "resume", batch_id, code=2).stderr
    done = cli("batch", "resume", batch_id, "--max-tokens-total", 1000)
    assert f"batch {batch_id}: 5 jobs run again" in done.stdout
    with working(ledger):
        assert "6/6 done, 0 failed, 0 cancelled" in cli("batch", "watch", batch_id).stdout


def _one_at_a_time(claim):  # type: ignore[no-untyped-def]
    return lambda self, ids, *rest: claim(self, list(ids)[:1], *rest)


@pytest.mark.parametrize(("share", "stops"), [("2", 2), ("50%", 3), ("0.01", 1)])
def test_failures_are_a_number_or_a_share(cli: Cli, table: Path, share: str, stops: int) -> None:
    batch_id = submitted(cli, table, "--max-failures", share)
    with Producer() as producer:
        assert producer.status(batch_id).budget.max_failures == stops


@pytest.mark.parametrize("share", ["0", "-1", "many", "1.5", "100%", "nan"])
def test_what_is_neither_is_refused(cli: Cli, table: Path, share: str) -> None:
    found = cli("batch", "submit", table, "--max-failures", share, code=2)
    assert "wanted a number from 1 or a share" in found.stderr


def test_a_terminal_shows_each_adapter(cli: Cli, ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "two.csv"
    path.write_text("prompt,adapter_id\none,sql\ntwo,poem\nthree,poem\n")
    batch_id = cli("batch", "submit", path).stdout.split()[1]
    run_queued(ledger)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Producer() as producer:
        watching.watch(producer, [batch_id], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "poem" in text
    assert "2/2" in text
    assert "3/3 done" in text


def test_an_end_that_was_seen_is_not_slept_on(
    cli: Cli, ledger: Ledger, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at a large batch takes seconds, and the pause after it ten times as long."""
    batch_id = submitted(cli, table)
    sleeps: list[float] = []

    def sleep(pause_s: float) -> None:
        sleeps.append(pause_s)
        run_queued(ledger)

    monkeypatch.setattr(watching.time, "sleep", sleep)
    assert "6/6 done" in cli("batch", "watch", batch_id).stdout
    assert len(sleeps) == 1


def test_a_real_process_reads_stdin(
    home: Path, settings: Settings, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORABATCH_HOME", str(home))
    out = tmp_path / "out.csv"
    command = [*PROGRAM, "batch", "submit", "-", "--format", "csv", "--adapter", "sql"]
    with working(ledger):
        done = subprocess.run(
            [*command, "--prompt-template", "Sum: {text}", "--watch", "--output", str(out)],
            input=b'text\n"a\nb"\n=two\n',
            capture_output=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"2/2 done" in done.stdout
    assert 'sql: Sum: a\nb"' in out.read_text()
    assert "stdin:4" in out.read_text()
