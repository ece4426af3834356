"""A producer process of the suite: `python -m tests.faults.producer [command of lorabatch ...]`.

It says that it is ready, and begins when it gets a line. With a command it is that command. Without
one it has read a JSON list of calls, each a list of jobs; it makes all of them at once, in threads,
and prints a JSON list of what each gave: ids, or the name of what it raised. FAULT_KILL has it kill
itself, by kill -9: "accepted 2" when it has committed its second group of jobs, "noted 2" when it
has noted them as sent, and has not sent them. FAULT_CHUNK: how many lines of a file make a group.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Any

from lorabatch import Job, Ledger
from lorabatch.errors import LoraBatchError
from lorabatch.feed import Feed
from lorabatch_producer import Producer, batch, sending
from tests.faults.crew import ROOT

__all__ = ["KILLED", "Played"]

THREADS = 50
READY = "ready\n"
END_LIMIT_S = 120
KILLED = -9


class Played:
    """A process that is ready. It has the settings of `env` alone."""

    def __init__(
        self, env: Mapping[str, str], *command: str, calls: Sequence[Sequence[Job]] = ()
    ) -> None:
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.producer", *command],
            env={**kept, "PYTHONPATH": os.pathsep.join(path), **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if command else None,
            text=True,
        )
        if not command:
            self._say(json.dumps([[job.model_dump(mode="json") for job in c] for c in calls]))
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == READY, "see what it says above"

    def go(self) -> Played:
        self._say("go")
        return self

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> str:
        """Wait for it: what it said."""
        out, errors = self._process.communicate(timeout=END_LIMIT_S)
        return out + (errors or "")

    def answers(self) -> list[Any]:
        """What each call gave; nothing if it was killed."""
        said = self.end()
        return list(json.loads(said)) if said else []

    @property
    def code(self) -> int:
        """Its exit code, -9 if it was killed, once it has ended."""
        return self._process.returncode

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


def _lay_trap(boundary: str, number: int) -> None:
    of, name = {"accepted": (Ledger, "accept"), "noted": (Feed, "take_these")}[boundary]
    original: Callable[..., Any] = getattr(of, name)
    passed = count(1)

    def trapped(*args: Any, **options: Any) -> Any:
        value = original(*args, **options)
        if next(passed) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    setattr(of, name, trapped)


def _wait_for_go() -> None:
    sys.stdout.write(READY)
    sys.stdout.flush()
    sys.stdin.readline()


def _make_calls() -> None:
    calls = [[Job.parse(fields) for fields in call] for call in json.loads(sys.stdin.readline())]
    with Producer() as producer, ThreadPoolExecutor(THREADS) as pool:
        producer.ledger.counts()
        producer.app()
        _wait_for_go()

        def enqueue(call: list[Job]) -> list[str] | str:
            try:
                return producer.enqueue_many(call)
            except LoraBatchError as error:
                return type(error).__name__

        sys.stdout.write(json.dumps(list(pool.map(enqueue, calls))))


def main() -> None:
    if trap := os.environ.get("FAULT_KILL"):
        boundary, number = trap.split()
        _lay_trap(boundary, int(number))
    if size := os.environ.get("FAULT_CHUNK"):
        vars(batch)["chunked"] = partial(sending.chunked, size=int(size))
    if not sys.argv[1:]:
        _make_calls()
        return
    from lorabatch_producer import cli

    _wait_for_go()
    cli.main()


if __name__ == "__main__":
    main()
