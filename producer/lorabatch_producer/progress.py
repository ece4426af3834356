"""Following a batch on the terminal until its last job has ended.

A live bar on a terminal; else a plain line whenever there is news, at most every few seconds.
Says once that no worker seems to run when nothing moves. Does not cancel anything when it is
interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lorabatch_producer.batch import BatchStatus
from lorabatch_producer.client import Producer
from lorabatch_producer.services import NO_WORKER, answering

__all__ = ["follow"]

FIRST_PAUSE_S = 0.2
LAST_PAUSE_S = 2.0
LINE_EVERY_S = 5.0
IDLE_S = 5.0


def follow(producer: Producer, batch_id: str, console: Console) -> BatchStatus:
    """Return once all jobs have ended; shows done, failed, total, jobs a second, time left."""
    if not console.is_terminal:
        return _watch(producer, batch_id, _Lines(console).show, console)
    bar = Progress(
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task("jobs", total=None, note="")
        return _watch(
            producer,
            batch_id,
            lambda news: bar.update(
                task, total=news.status.total, completed=news.status.ended, note=news.note
            ),
            console,
        )


@dataclass(frozen=True)
class _News:
    """A batch as it stands, and how fast it moves since the first look."""

    status: BatchStatus
    jobs_per_s: float

    @property
    def note(self) -> str:
        ended_badly = self.status.failed + self.status.cancelled
        return f"{ended_badly} failed, {self.jobs_per_s:.1f} jobs/s"


class _Lines:
    """Plain lines for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_s = float("-inf")
        self._ended = -1

    def show(self, news: _News) -> None:
        status = news.status
        over = status.ended == status.total
        early = time.monotonic() - self._last_s < LINE_EVERY_S
        if status.ended == self._ended or (early and not over):
            return
        self._last_s, self._ended = time.monotonic(), status.ended
        left = (status.total - status.ended) / news.jobs_per_s if news.jobs_per_s else None
        eta = "" if over or left is None else f", about {left:.0f} s left"
        self._console.print(f"{status.ended}/{status.total} done, {news.note}{eta}", soft_wrap=True)


def _watch(
    producer: Producer, batch_id: str, show: Callable[[_News], None], console: Console
) -> BatchStatus:
    started = moved = time.monotonic()
    status = first = producer.status(batch_id)
    pause_s, asked = FIRST_PAUSE_S, False
    while True:
        passed = time.monotonic() - started
        show(_News(status, (status.ended - first.ended) / passed if passed > 0.05 else 0.0))
        if status.ended == status.total:
            return status
        if not asked and not status.running and time.monotonic() - moved > IDLE_S:
            asked = True
            if not answering(producer.app()):
                console.print(NO_WORKER, style="yellow", highlight=False)
        time.sleep(pause_s)
        seen = producer.status(batch_id)
        if seen.ended != status.ended:
            moved, asked, pause_s = time.monotonic(), False, FIRST_PAUSE_S
        pause_s = min(pause_s * 1.5, LAST_PAUSE_S)
        status = seen
