"""Bulk files by the command line: submitted, followed and written."""

from __future__ import annotations

import io
import json
import os
import resource
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from lorabatch import Ledger
from lorabatch.tables import jobs
from lorabatch_producer import progress
from tests.bad_inputs import short
from tests.command_line import Cli
from tests.played_worker import by_adapter, run_queued, succeeds, working

FILE_MAX_BYTES = 1 << 20


def test_a_batch_from_file_to_file(cli: Cli, ledger: Ledger, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with working(ledger, by_adapter):
        found = cli("batch", "submit", file, "--tenant", "acme", "--output", out, code=1)
    batch_id = found.stdout.split()[1]
    assert "2 lines accepted, 1 bad" in found.stdout
    assert "2/2 done, 1 failed" in found.stdout
    assert "line 2: not_json: not valid JSON: Expecting value at 1" in found.stderr
    assert "bad lines: 1, failed jobs: 1" in found.stderr
    assert [json.loads(raw)["custom_id"] for raw in out.read_text().splitlines()] == ["x", None]
    assert (tmp_path / "out.errors.jsonl").read_text().count("\n") == 1
    status = json.loads(cli("batch", "status", batch_id, "--json").stdout)
    assert (status["succeeded"], status["failed"], status["rejected_lines"]) == (1, 1, 1)
    first = out.read_bytes()
    out.unlink()
    cli("batch", "output", batch_id, file, "--output", out, code=1)
    assert out.read_bytes() == first
    assert cli("batch", "submit", file, "--tenant", "acme", code=1).stdout.split()[1] == batch_id
    again = cli("batch", "submit", file, "--tenant", "acme", "--new", code=1)
    assert again.stdout.split()[1] != batch_id
    assert ledger.counts() == {"succeeded": 1, "failed": 1, "queued": 3}
    counts = ledger.counts(batch_id)
    assert counts == {"succeeded": 1, "queued": 1}, "the line that failed runs again"


def test_a_good_batch_ends_well(cli: Cli, ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(short())
    with working(ledger):
        cli("batch", "submit", path, "--wait")
    cli("batch", "submit", path, "--queue", "other", "--new")
    assert "of 1 jobs are open" in cli("batch", "output", *_newest(ledger, path), code=2).stderr


def test_a_file_may_have_any_name(cli: Cli, ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "f\udcff\n.csv"
    path.write_text("prompt\nhi\n")
    cli("batch", "submit", path, "--base")
    with ledger.engine.connect() as connection:
        assert connection.scalar(sa.select(jobs.c.custom_id)) == "f\\udcff\\n.csv:2"
    lines = tmp_path / "f\udcff.jsonl"
    lines.write_bytes(short())
    batch_id = cli("batch", "submit", lines).stdout.split()[1]
    assert "f\\udcff.jsonl" in cli("batch", "status", batch_id).stdout
    assert "is not valid Unicode" in cli("status", "f\udcff", code=2).stderr


def test_a_pipe_is_a_file(cli: Cli, ledger: Ledger, tmp_path: Path) -> None:
    """As <(...) of a shell."""
    os.mkfifo(tmp_path / "pipe")
    writing = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(short(),), daemon=True)
    writing.start()
    assert "1 lines accepted, 0 bad" in cli("batch", "submit", tmp_path / "pipe").stdout


def test_an_output_that_does_not_fit_leaves_nothing(
    cli: Cli, ledger: Ledger, file: Path, tmp_path: Path
) -> None:
    """The kernel says no in the middle of the file."""
    batch_id = cli("batch", "submit", file, code=1).stdout.split()[1]
    run_queued(ledger, lambda claim: succeeds(claim, text="long" * FILE_MAX_BYTES))
    out, before = tmp_path / "out.jsonl", sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_MAX_BYTES, limits[1]))
    try:
        found = cli("batch", "output", batch_id, file, "--output", out, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found.stderr.startswith(f"lorabatch: {out} cannot be written: File too large; ")
    assert sorted(tmp_path.iterdir()) == before
    cli("batch", "output", batch_id, file, "--output", out, code=1)
    assert len(out.read_bytes()) > FILE_MAX_BYTES


def _newest(ledger: Ledger, path: Path) -> list[object]:
    with ledger.engine.connect() as connection:
        query = "SELECT batch_id FROM batches ORDER BY created_us DESC LIMIT 1"
        batch_id = connection.exec_driver_sql(query).scalar_one()
    return [batch_id, path, "--output", path.with_name("out")]


def test_only_the_first_bad_lines_are_shown(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b'{"\x1b[31m": 1}\n' + b"x\n" * 30)
    found = cli("batch", "submit", path, code=1)
    assert found.stderr.count("not_json") == 10
    assert "... and 21 more bad lines" in found.stderr
    assert "\x1b" not in found.stderr


def test_a_batch_without_workers_says_so(
    cli: Cli, ledger: Ledger, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "IDLE_S", 0.0)

    def nobody(app: Any) -> list[str]:
        run_queued(ledger)
        return []

    monkeypatch.setattr(progress, "answering", nobody)
    assert "no worker seems to run" in cli("batch", "submit", file, "--wait", code=1).stdout


def test_a_bar_on_a_terminal(cli: Cli, ledger: Ledger, file: Path) -> None:
    from rich.console import Console

    from lorabatch_producer import Producer
    from lorabatch_producer.batch import submit

    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Producer() as producer:
        batch_id = submit(producer, file).batch_id
        with working(ledger):
            assert progress.follow(producer, batch_id, console).succeeded == 2
    assert "2/2" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("out", "more", "why"),
    [
        ("in.jsonl", (), "would replace its input"),
        ("no/out.jsonl", (), "no such folder"),
        ("out.jsonl.gz", (), "results are not compressed; leave out .gz"),
        ("out.csv", ("--with-input",), "lines of JSONL have no columns"),
    ],
)
def test_an_output_that_could_not_be_written_is_known_before(
    cli: Cli, ledger: Ledger, file: Path, out: str, more: tuple[str, ...], why: str
) -> None:
    with working(ledger):
        found = cli("batch", "submit", file, "--output", file.parent / out, *more, code=2)
    assert why in found.stderr
    assert ledger.counts() == {}
    assert "give --output" in cli("batch", "submit", file, "--with-input", code=2).stderr


def test_the_file_of_bad_lines_does_not_replace_the_input(
    cli: Cli, ledger: Ledger, tmp_path: Path
) -> None:
    path = tmp_path / "in.errors.jsonl"
    path.write_bytes(short())
    batch_id = cli("batch", "submit", path).stdout.split()[1]
    run_queued(ledger)
    out = tmp_path / "in.jsonl"
    found = cli("batch", "output", batch_id, path, "--output", out, code=2)
    assert "would replace its input" in found.stderr
    assert path.read_bytes() == short()
