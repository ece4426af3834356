"""A process of our own that does what may take the one it is in along, under bounds.

It runs one of our files by itself and is asked by lines. Raises TimeoutError and EOFError. Used
under its owner's lock.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["Child"]

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
