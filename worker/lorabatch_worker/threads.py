"""Threads of this process, and how many OpenMP threads each of them computes with.

torch keeps the number by thread, but a thread takes over whatever any thread set last when it
first asks for it. So ask before you set, in every thread that computes.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable

import torch

__all__ = ["Daemons", "compute_beside", "compute_with", "cores"]

NICE = 12


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compute_with(threads: int) -> None:
    """From now on this thread computes with so many, whatever others set."""
    torch.get_num_threads()
    torch.set_num_threads(threads)


def compute_beside() -> None:
    """From now on this thread computes alone, and only what the engine's threads leave it: on Linux
    each thread has a niceness of its own."""
    compute_with(1)
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class Daemons:
    """Up to `count` threads that compute beside the engine and that the end of the process does not
    wait for: what they call may hang for as long as a network lets it."""

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._started = 0
        self._closed = False

    def submit(self, call: Callable[[], None]) -> None:
        """Run it on one of the threads; it raises nothing. RuntimeError once this is closed."""
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self._name}: closed")
            if self._started < self._count:
                name = f"{self._name}-{self._started}"
                threading.Thread(target=self._run, name=name, daemon=True).start()
                self._started += 1
            self._calls.put(call)

    def close(self) -> None:
        """What has not begun never will."""
        with self._lock:
            self._closed = True
            for _ in range(self._started):
                self._calls.put(None)

    def _run(self) -> None:
        compute_beside()
        while (call := self._calls.get()) is not None and not self._closed:
            call()
            del call  # or it would be held, with all it made, until the next comes
