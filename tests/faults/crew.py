"""Worker processes of the suite, kept from one fault to the next where their settings allow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.faults.waiting import until

__all__ = ["ROOT", "STOP_LIMIT_S", "Crew", "Member"]

ROOT = Path(__file__).parents[2]
STOP_LIMIT_S = 60


class Member:
    """One worker process; its first command words may put it elsewhere."""

    def __init__(self, folder: Path, env: Mapping[str, str], prefix: tuple[str, ...] = ()) -> None:
        folder.mkdir()
        self.env = dict(env)
        self._seen = 0
        self.log = folder / "log"
        self.trap = folder / "trap"
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        ours = {"PYTHONPATH": os.pathsep.join(path), "FAULT_TRAP": str(self.trap)}
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "tests.faults.worker"],
                env={**kept, **ours, **env},
                stdout=file,
                stderr=file,
            )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def owner(self) -> str:
        """What its name in the ledger contains."""
        return f":{self.process.pid}:"

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def ready(self) -> bool:
        """Whether it has begun to work; it may have ended since."""
        return '"ready"' in self.text()

    def mark(self) -> None:
        """`news` begins here."""
        self._seen = len(self.text())

    def news(self) -> str:
        return self.text()[self._seen :]

    def wait_ready(self) -> Member:
        def ready() -> bool:
            assert self.alive, self.text()[-4000:]
            return self.ready

        until("worker ready", ready)
        return self

    def arm(self, boundary: str, count: int, number: signal.Signals) -> None:
        """At the count-th passing of this boundary it gets that signal."""
        new = self.trap.with_suffix(".new")
        new.write_text(f"{boundary} {count} {int(number)}")
        self.sprung_file.unlink(missing_ok=True)
        new.rename(self.trap)

    def disarm(self) -> None:
        self.trap.unlink(missing_ok=True)

    @property
    def sprung_file(self) -> Path:
        return self.trap.with_suffix(".sprung")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        self.signal(signal.SIGTERM)
        return self.process.wait(STOP_LIMIT_S)


class Crew:
    """The workers of a shop. `ready` gives workers with exactly these settings, and ends all
    others."""

    def __init__(self, folder: Path, env: Mapping[str, str], prefix: tuple[str, ...] = ()) -> None:
        self._prefix = prefix
        self._folder = folder
        self.env = dict(env)
        self._started = 0
        self.members: list[Member] = []

    def start(self, **env: str) -> Member:
        self._started += 1
        folder = self._folder / f"worker-{self._started}"
        member = Member(folder, {**self.env, **env}, self._prefix)
        self.members.append(member)
        return member

    def ready(self, count: int, **env: str) -> list[Member]:
        wanted = {**self.env, **env}
        fit = [m for m in self.members if m.alive and m.env == wanted][:count]
        self.end([m for m in self.members if m not in fit])
        while len(fit) < count:
            fit.append(self.start(**env))
        for member in fit:
            member.wait_ready().mark()
        return fit

    def end(self, members: list[Member]) -> None:
        """Stop these, all together; what does not obey is killed."""
        alive = [member for member in members if member.alive]
        for member in alive:
            member.signal(signal.SIGCONT)
            member.signal(signal.SIGTERM)
        for member in alive:
            try:
                member.process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                member.kill()
        self.members = [member for member in self.members if member not in members]

    def close(self) -> None:
        for member in self.members:
            if member.alive:
                member.kill()
        self.members.clear()
