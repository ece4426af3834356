"""The process that tries grammars: one a line, one answer a line, JSON.

A grammar comes with a job, and its compiler can be made to take minutes, gigabytes, or to overrun
its stack, which ends the process it is in. Started by `grammars.py` as a file of its own, so that
it imports nothing of ours, and no torch. Its one argument is how many bytes it may map beyond what
it needs itself. A request holds the grammar, the compiler's limits, held_bytes that the compiled
grammar may hold, and end_s, after which the kernel ends the process. An answer holds `why` it is
refused, or null; there is one before the first request. It has a quarter of the stack that threads
usually have: what passes here has room elsewhere. Raises nothing on purpose. Not covered:
held_bytes where the C library is not glibc 2.33 or later.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import llguidance

__all__ = ["main"]

STACK_BYTES = 2 << 20
STATM = Path("/proc/self/statm")
END = 256


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2. Its hblkhd and uordblks are bytes in use, mapped and other ones."""

    _fields_: ClassVar = [("of", ctypes.c_size_t * 10)]
    HBLKHD, UORDBLKS = 4, 7


class _Bytes:
    """A tokenizer of single bytes."""

    eos_token_id = END
    bos_token_id = None
    tokens = (*(bytes([i]) for i in range(END)), b"<end>")
    special_token_ids = (END,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def main() -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the worker, which drains first
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is not an answer
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()), slices=[])
    limit(int(sys.argv[1]))
    why = None
    while True:
        answers.write(json.dumps({"why": why}).encode() + b"\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)
        line = sys.stdin.buffer.readline()
        if not line.endswith(b"\n"):
            return
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["end_s"])
        why = problem(tokenizer, request)


def limit(allowance: int) -> None:
    """Memory, and no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if STATM.exists():
        mapped = int(STATM.read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        total = mapped + allowance
        soft = total if hard == resource.RLIM_INFINITY else min(total, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, soft))


def allocated() -> int:
    """Bytes in use; 0 where the C library does not say."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = _Mallinfo
    info = mallinfo2()
    return int(info.of[info.HBLKHD] + info.of[info.UORDBLKS])


def problem(tokenizer: Any, request: Mapping[str, Any]) -> str | None:
    """Why the grammar cannot be used, or its first token cannot be found."""
    found = ["the compiler failed"]

    def compile_it() -> None:
        before = allocated()
        limits = llguidance.LLParserLimits(**request["limits"])
        matcher = llguidance.LLMatcher(tokenizer, request["grammar"], limits=limits, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
        held, most = allocated() - before, request["held_bytes"]
        over = f"it takes {held >> 20} MiB when compiled, allowed {most >> 20}; make it simpler"
        found[0] = matcher.get_error() or (over if held > most else "")

    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=compile_it)
    thread.start()
    thread.join()
    return found[0] or None


if __name__ == "__main__":
    main()
