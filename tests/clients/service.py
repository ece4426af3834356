"""The whole service, as its users start it: `lorabatch-worker` with the real model and the shipped
adapters, `lorabatch serve` with keys, embedded servers. `caller` is `sql` with a template of its
own that tells of tools, as the base model's does not."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorabatch import Settings
from lorabatch.database import open_database
from lorabatch.embedded import ensure_valkey, stop_valkey
from lorabatch.keys import Keys
from tests.models import ROOT, bundled_folder

__all__ = ["Service", "running_service"]

TEMPLATE = Path(__file__).with_name("caller.jinja")
BIN = Path(sys.executable).parent
KEPT = ("PATH", "HOME", "PYTHONPATH")
READY_S = 300.0
STOPPED = (0, -signal.SIGTERM)  # uvicorn passes the signal on once it is done
LISTENING = "Uvicorn running on"


@dataclass(frozen=True)
class Service:
    """Where it is, and a key of each of two tenants."""

    url: str
    key: str
    other_key: str
    broker_url: str
    settings: Settings

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"


@contextlib.contextmanager
def running_service(home: Path) -> Iterator[Service]:
    """Until the block is left; both processes must end well."""
    bundled_folder()
    (home / "models").symlink_to(ROOT / ".lorabatch" / "models")
    caller = home / "adapters" / "caller"
    shutil.copytree(ROOT / "examples" / "adapters" / "sql", caller)
    shutil.copy(TEMPLATE, caller / "chat_template.jinja")
    settings = Settings.load(home=home)
    broker_url = ensure_valkey(home)
    database = open_database(settings)
    keys = [Keys(database).create(tenant)[1] for tenant in ("acme", "globex")]
    database.dispose()
    with _process("lorabatch-worker", home) as worker, _process("lorabatch", home, "serve") as api:
        _wait_for('"ready"', worker)
        line = _wait_for(LISTENING, api)
        url = next(word for word in line.split() if word.strip('"').startswith("http://"))
        yield Service(url.strip('",'), *keys, broker_url, settings)
    stop_valkey(home)


@dataclass(frozen=True)
class _Process:
    process: subprocess.Popen[bytes]
    log: Path


@contextlib.contextmanager
def _process(program: str, home: Path, *arguments: str) -> Iterator[_Process]:
    shipped = sorted((ROOT / "examples" / "adapters").glob("*/adapter_config.json"))
    environment = {
        **{name: os.environ[name] for name in KEPT if name in os.environ},
        "LORABATCH_HOME": str(home),
        "LORABATCH_ADAPTERS": ",".join(f"{p.parent.name}={p.parent}" for p in shipped),
        "LORABATCH_DTYPE": "float32",
        "LORABATCH_LOG_FORMAT": "json",
        "LORABATCH_HTTP_PORT": "0",
        "LORABATCH_DRAIN_S": "5",
    }
    log = home / f"{program}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(BIN / program), *arguments], env=environment, stdout=file, stderr=file
        )
    started = _Process(process, log)
    try:
        yield started
        assert process.poll() is None, log.read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in STOPPED, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait_for(text: str, started: _Process) -> str:
    """The line of its log that has it."""
    end_s = time.monotonic() + READY_S
    while time.monotonic() < end_s:
        said = started.log.read_text(errors="replace")
        for line in said.splitlines():
            if text in line:
                return line
        assert started.process.poll() is None, said
        time.sleep(0.05)
    raise AssertionError(f"{text!r} was not said in {READY_S} s: {started.log.read_text()}")
