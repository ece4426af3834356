"""The command line as a real process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lorabatch import Ledger, Settings
from lorabatch.database import open_database
from tests.played_worker import working

PROGRAM = [sys.executable, "-W", "error", "-m", "lorabatch_producer.cli"]


def test_a_real_process(home: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABATCH_HOME", str(home))
    with working(ledger):
        done = subprocess.run(
            [*PROGRAM, "enqueue", "naïve 🦜", "--wait"], capture_output=True, text=True, check=False
        )
    assert (done.returncode, done.stdout) == (0, "None: naïve 🦜\n")
    script = Path(sys.executable).with_name("lorabatch")
    failed = subprocess.run([script, "result", "x"], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "lorabatch: job 'x': no such job in this ledger\n"


def test_an_interrupted_wait_leaves_the_job(
    home: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORABATCH_HOME", str(home))
    # Tests that run in a shell's background are told to ignore SIGINT; the program must not be.
    process = subprocess.Popen(
        [*PROGRAM, "enqueue", "hi", "--wait"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    assert process.stderr is not None
    assert "no worker seems to run" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the job goes on: `lorabatch result " in errors
    engine = open_database(settings)
    assert Ledger(engine).counts() == {"queued": 1}
    engine.dispose()
