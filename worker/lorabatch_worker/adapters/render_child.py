"""The process that renders adapters' chat templates: one request a line, one answer a line, JSON.

Started by `render.py` as a file of its own, so that it imports nothing of ours, and no torch. Its
one argument is how many bytes it may map beyond what it needs itself. A request holds template,
messages, special_tokens, tools, max_chars and end_s: the kernel ends the process if it takes so
many seconds, so that an endless template does not outlive a worker that was killed. An answer holds
`kind` (text, toolless, long, memory, broken, refused) and `worn`: memory that a template took was
not all given back. It ends when its input does. Raises nothing on purpose. Not covered: a limit of
memory where there is no /proc (macOS).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["main"]

STATM = Path("/proc/self/statm")
SEEN_CHARS, SHOWN_CHARS = 2000, 300


def main() -> None:
    """Answer until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the worker, which drains first
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what an import prints is not an answer
    allowance = int(sys.argv[1])
    import transformers.utils.chat_template_utils  # noqa: F401 - before memory is limited

    start = mapped_bytes()
    if start:
        allow(start + allowance)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer: dict[str, Any] = {"kind": "ready"}
    while True:
        answer["worn"] = answer["kind"] == "memory" or mapped_bytes() > start + allowance // 4
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)
        line = sys.stdin.buffer.readline()
        if not line.endswith(b"\n"):
            return
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["end_s"])
        answer = answer_to(request)


def allow(total_bytes: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = total_bytes if hard == resource.RLIM_INFINITY else min(total_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, soft))


def mapped_bytes() -> int:
    """Address space in use; 0 where nothing says so."""
    if not STATM.exists():
        return 0
    return int(STATM.read_text().split()[0]) * resource.getpagesize()


def answer_to(request: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers' apply_chat_template renders: its environment, the same variables."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        fields: dict[str, Any] = {
            "conversations": [request["messages"]],
            "chat_template": request["template"],
            "add_generation_prompt": True,
            **request["special_tokens"],
        }
        tools = request.get("tools")
        rendered: Any = render_jinja_template(**fields, tools=tools or None)
        text = rendered[0][0]
        without: Any = render_jinja_template(**fields) if tools else None
        if tools and text == without[0][0]:
            return {"kind": "toolless"}
        if len(text) > request["max_chars"]:
            return {"kind": "long", "chars": len(text)}
        text.encode()  # a lone surrogate is an error here, not in the tokenizer
        return {"kind": "text", "text": text}
    except MemoryError:
        return {"kind": "memory"}
    except jinja2.TemplateSyntaxError as error:
        return {"kind": "broken", "why": in_short(error)}
    except Exception as error:  # noqa: BLE001 - a template can raise anything, 1/0 included
        return {"kind": "refused", "why": in_short(error)}


def in_short(error: Exception) -> str:
    """On one line; the template may have made the text of any length."""
    try:
        text = " ".join(str(error)[:SEEN_CHARS].split())
    except Exception:  # noqa: BLE001 - str() of what the template raised
        text = ""
    text = text or type(error).__name__
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


if __name__ == "__main__":
    main()
