"""Keep freed memory, instead of giving it back to the system after every layer.

A step frees and takes megabytes hundreds of times. glibc returns such pieces at once, and the next
layer pays for fresh pages. Call it when the model is loaded, so that what loading needed still goes
back. Does nothing where the C library is no glibc.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEEP_BYTES = 1 << 29
LARGEST_BYTES = 1 << 25


def keep_freed_memory() -> bool:
    """Whether the allocator took the advice."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    asked = ((M_TRIM_THRESHOLD, KEEP_BYTES), (M_MMAP_THRESHOLD, LARGEST_BYTES))
    taken = [mallopt(option, value) for option, value in asked]
    return taken == [1, 1]
