"""How many OpenMP threads a Python thread of this process computes with.

torch keeps the number by thread, but a thread takes over whatever any thread set last when it
first asks for it. So ask before you set, in every thread that computes.
"""

from __future__ import annotations

import torch

__all__ = ["compute_with"]


def compute_with(threads: int) -> None:
    """From now on this thread computes with so many, whatever others set."""
    torch.get_num_threads()
    torch.set_num_threads(threads)
