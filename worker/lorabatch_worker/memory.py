"""Which errors say that a device, or the host, lacks memory."""

from __future__ import annotations

import torch

__all__ = ["out_of_memory"]

# The host's allocator; the driver, which pins memory and loads kernels; cuBLAS; Triton.
LACKING = ("DefaultCPUAllocator: ", "out of memory", "ALLOC_FAILED", "OutOfMemory")


def out_of_memory(error: Exception) -> bool:
    """Whether less of it, or later, may do. torch has a type for what its allocator of a device
    lacks, and only words for all else."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in LACKING)
