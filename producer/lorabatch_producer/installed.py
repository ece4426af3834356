"""What is installed on this machine, found without importing any of it."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

__all__ = ["gpus", "installed_version"]

NVIDIA_SMI_TIMEOUT_S = 10


def installed_version(package: str, module: str | None = None) -> str | None:
    """The version of a package whose module can be found; None if either is missing."""
    try:
        found = find_spec(module or package)
        return version(package) if found is not None else None
    except (PackageNotFoundError, ModuleNotFoundError, ValueError):
        return None


def gpus() -> list[str] | None:
    """Names and memory of NVIDIA GPUs by nvidia-smi; None if there is no such program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
