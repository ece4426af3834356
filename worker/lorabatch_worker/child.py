"""A process of our own that does what may take the one it is in along, under bounds.

It runs one of our files by itself and is asked by lines. Raises TimeoutError, EOFError and, where
no process starts, EngineFault.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from lorabatch.errors import EngineFault

__all__ = ["Child", "Children"]

START_S = 120.0  # one imports transformers without torch: 0.8 s on two idle cores
TRIES = 2  # it may have died for a reason of its own, while it was idle

# No secret of the worker's lies where what got out of a sandbox could read it.
ENVIRONMENT = {
    *("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "HOME", "TMPDIR"),
    *("LANG", "LC_ALL", "LC_CTYPE", "LC_TIME", "TZ"),
}


class Child:
    """Answers one line to one line. It is told how many bytes it may have."""

    def __init__(self, script: Path, memory_bytes: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script), str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={
                **{name: value for name, value in os.environ.items() if name in ENVIRONMENT},
                "OMP_NUM_THREADS": "1",  # numpy and others start as many as there are cores
            },
            start_new_session=True,  # a terminal's signals are for the worker
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        for fd in (self._in, self._out):
            os.set_blocking(fd, False)

    def ask(self, line: bytes, bound_s: float) -> bytes:
        """The next line it says. Raises TimeoutError, and EOFError if it died."""
        end_s = time.monotonic() + bound_s
        left, said = memoryview(line), bytearray()
        with selectors.DefaultSelector() as ready:
            ready.register(self._out, selectors.EVENT_READ)
            if left:
                ready.register(self._in, selectors.EVENT_WRITE)
            while not said.endswith(b"\n"):
                events = ready.select(max(0.0, end_s - time.monotonic()))
                if not events and time.monotonic() >= end_s:
                    raise TimeoutError
                for key, _ in events:
                    if key.fd == self._out:
                        said += self._read()
                        continue
                    left = left[self._write(left) :]
                    if not left:
                        ready.unregister(self._in)
        return bytes(said)

    def _read(self) -> bytes:
        piece = os.read(self._out, 1 << 20)
        if not piece:
            raise EOFError
        return piece

    def _write(self, line: memoryview) -> int:
        try:
            return os.write(self._in, line)
        except BrokenPipeError:
            raise EOFError from None

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Children:
    """One at a time, from the first question on, and a new one after each that was ended. All but
    `close` is used under the lock. `what` they do, for errors."""

    def __init__(self, script: Path, memory_bytes: int, what: str) -> None:
        self.lock = threading.Lock()
        self.child: Child | None = None
        self.memory_bytes = memory_bytes
        self._script = script
        self._what = what
        self._end_child: weakref.finalize[..., Any] | None = None
        self._closed = False

    def answer(self, job_id: str, line: bytes, bound_s: float) -> tuple[dict[str, Any], float]:
        """What it says, and in how many seconds, not counting its start. Raises TimeoutError, and
        EOFError if TRIES of them died."""
        for _ in range(TRIES):
            child = self._started(job_id)
            started_s = time.monotonic()
            try:
                said = child.ask(line, bound_s)
            except TimeoutError:
                self.end()
                raise
            except EOFError:
                self.end()
                continue
            return json.loads(said), time.monotonic() - started_s
        raise EOFError

    def end(self) -> None:
        """The next question goes to a new one."""
        if self._end_child is not None:
            self._end_child()
        self.child = self._end_child = None

    def close(self) -> None:
        """End the child; what it is asked just now ends as EngineFault."""
        self._closed = True
        child = self.child
        if child is not None:
            child.kill()
        with self.lock:
            self.end()

    def _started(self, job_id: str) -> Child:
        """It says a line when it is ready."""
        if not self._closed and self.child is None:
            child = self.child = Child(self._script, self.memory_bytes)
            self._end_child = weakref.finalize(self, child.end)
            try:
                child.ask(b"", START_S)
            except (TimeoutError, EOFError):
                self.end()
        if self._closed or self.child is None:
            why = "is closed" if self._closed else "did not start; see the worker's error output"
            raise EngineFault(f"job {job_id!r}: the process that {self._what} {why}")
        return self.child
