"""How many OpenMP threads a Python thread of this process computes with.

torch keeps the number by thread, but a thread takes over whatever any thread set last when it
first asks for it. So ask before you set, in every thread that computes.
"""

from __future__ import annotations

import os
import sys
import threading

import torch

__all__ = ["compute_beside", "compute_with"]

NICE = 12


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
