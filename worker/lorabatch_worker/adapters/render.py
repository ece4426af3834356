"""Adapters' own chat templates, rendered in a process of their own under bounds.

An adapter's template comes from a tenant and is hostile until shown otherwise: it may never end,
fill the memory or write without end. One child process (render_child.py) renders one template at a
time; one that is over a bound is ended with it, and the next job gets a new one. The bounds are of
seconds (waiting for one's turn and starting a child are not counted), bytes and characters.
A template that ran over time or memory twice in a row is left alone for RETRY_S, or its jobs would
keep everybody else's from being rendered. Raises InvalidAdapter, InvalidJob, EngineFault.
Thread-safe. Not covered: the base model's template, which is the operator's (prompt.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorabatch.errors import InvalidAdapter, InvalidJob, JobError
from lorabatch.fields import MAX_PROMPT_CHARS
from lorabatch_worker.child import Children

__all__ = ["TOOLLESS", "TemplateRenderer"]

BOUND_S = 5.0
MEMORY_BYTES = 1 << 30
RETRY_S = 60.0
SLOW_PART = 5  # of the bound: over which a template counts as slow
REMEMBERED = 256  # templates that ran over
TOOLLESS = (
    "the {}'s chat template writes the same without them: it knows no tools; use a model whose "
    "template does, or leave them out"
)
CHILD = Path(__file__).with_name("render_child.py")


class TemplateRenderer:
    """Renders one template at a time. Its child starts with the first one."""

    def __init__(
        self,
        bound_s: float = BOUND_S,
        max_chars: int = MAX_PROMPT_CHARS,
        memory_bytes: int = MEMORY_BYTES,
        retry_s: float = RETRY_S,
    ) -> None:
        self.bound_s = bound_s
        self.max_chars = max_chars
        self.retry_s = retry_s
        self._children = Children(CHILD, memory_bytes, "renders chat templates")
        self._overrun: dict[str, tuple[int, float, str]] = {}  # template: times, when, what

    def render(
        self,
        job_id: str,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, str],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The text that apply_chat_template makes, with a generation prompt."""
        chars = sum(len(m["content"]) + len(str(m.get("tool_calls", ""))) for m in messages)
        if chars > self.max_chars:
            raise InvalidJob(
                f"job {job_id!r}: its messages have {chars} characters, allowed {self.max_chars} "
                "with an adapter's own chat template; shorten them"
            )
        request = {
            "template": template,
            "messages": messages,
            "special_tokens": special_tokens,
            "tools": tools,
            "max_chars": self.max_chars,
            "end_s": 2 * self.bound_s + 1,  # only if nobody is left here to end it
        }
        line = json.dumps(request, default=str).encode() + b"\n"
        with self._children.lock:
            self._check_left_alone(job_id, template)
            answer = self._answer(job_id, line)
            self._note(template, answer)
        if answer["kind"] == "text":
            return str(answer["text"])
        raise self._error(job_id, answer)

    def close(self) -> None:
        """End the child; a template that is being rendered ends as EngineFault."""
        self._children.close()

    # -- under the lock ------------------------------------------------------

    def _answer(self, job_id: str, line: bytes) -> dict[str, Any]:
        try:
            answer, took_s = self._children.answer(job_id, line, self.bound_s)
        except TimeoutError:
            return {"kind": "time"}
        except EOFError:
            return {"kind": "died"}
        if answer["worn"]:
            self._children.end()
        return {**answer, "took_s": took_s}

    def _check_left_alone(self, job_id: str, template: str) -> None:
        times, when_s, what = self._overrun.get(template, (0, 0.0, ""))
        left_s = when_s + self.retry_s - time.monotonic()
        if times > 1 and left_s > 0:
            raise InvalidAdapter(
                f"job {job_id!r}: the adapter's chat template {what}, {times} times in a row, and "
                f"is not tried for another {left_s:.0f} s; give the adapter a sound one"
            )

    def _note(self, template: str, answer: Mapping[str, Any]) -> None:
        times = self._overrun.pop(template, (0,))[0]
        took_s = answer.get("took_s", 0.0)
        slow = took_s > self.bound_s / SLOW_PART  # other adapters' templates wait meanwhile
        if slow or answer["kind"] in ("time", "memory", "died"):
            what = f"took {took_s:.1f} s" if slow else self._what(answer)
            seen = (times + 1, time.monotonic(), what)
            self._overrun[template] = seen
            if len(self._overrun) > REMEMBERED:
                del self._overrun[next(iter(self._overrun))]  # the one that was seen longest ago

    # -- errors --------------------------------------------------------------

    def _error(self, job_id: str, answer: Mapping[str, Any]) -> JobError:
        if answer["kind"] == "refused":
            return InvalidJob(
                f"job {job_id!r}: the chat template refuses these messages: {answer['why']}"
            )
        if answer["kind"] == "toolless":
            return InvalidJob(f"job {job_id!r}: tools: {TOOLLESS.format('adapter')}")
        if answer["kind"] == "broken":
            return InvalidAdapter(f"job {job_id!r}: the chat template is broken: {answer['why']}")
        return InvalidAdapter(
            f"job {job_id!r}: the adapter's chat template {self._what(answer)}; "
            "look for loops and repetition in it, or send a prompt"
        )

    def _what(self, answer: Mapping[str, Any]) -> str:
        memory_mib = self._children.memory_bytes >> 20
        return {
            "time": f"was not done after {self.bound_s:g} s, which is the bound",
            "memory": f"wanted over {memory_mib} MiB of memory, which is the bound",
            "died": "brought down the process that renders it, twice "
            f"(bounds: {self.bound_s:g} s, {memory_mib} MiB)",
            "long": f"made {answer.get('chars')} characters, allowed {self.max_chars}",
        }[answer["kind"]]
