"""How a worker is started, and how it says why it cannot start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorabatch.embedded import valkey_running


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    base = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        [sys.executable, *command],
        env={**base, **env},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


MAIN = ("-c", "from lorabatch_worker.main import main; main()")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--device", "gpu"], "LORABATCH_DEVICE"),
        (["--max-seqs", "0"], "LORABATCH_MAX_SEQS"),
        (["--broker-url", "redis://127.0.0.1:1/0"], "broker does not answer"),
        (
            ["--database-url", "postgresql://nobody@127.0.0.1:1/x"],
            "does not answer",
        ),
        (["--database-url", "sqlite:////{home}/other.db"], "lorabatch db upgrade"),
    ],
)
def test_what_is_not_ready_is_one_line_and_exit_code_2(
    home: Path, options: list[str], says: str
) -> None:
    options = [option.format(home=str(home).lstrip("/")) for option in options]
    ended = run(*MAIN, "--home", str(home), *options)
    assert ended.returncode == 2, ended.stderr
    (line,) = [x for x in ended.stderr.splitlines() if x.startswith("lorabatch-worker: ")]
    assert says in line
    assert "Traceback" not in ended.stderr


def test_importing_the_app_module_starts_and_loads_nothing(home: Path) -> None:
    code = "import sys, lorabatch_worker.app; print('torch' in sys.modules)"
    ended = run("-c", code, LORABATCH_HOME=str(home))
    assert ended.stdout.strip() == "False", ended.stderr
    assert valkey_running(home) is None


def test_the_celery_command_finds_the_app(home: Path) -> None:
    ended = run("-m", "celery", "-A", "lorabatch_worker.app", "report", LORABATCH_HOME=str(home))
    assert ended.returncode == 0, ended.stderr
    assert "lorabatch_worker.pool:EnginePool" in ended.stdout
    assert valkey_running(home) is not None
