"""Batches on the terminal, live, until their last jobs have ended: what has ended of each and of
each of its adapters, what runs and waits, tokens a second, time left, and what of its limit is
spent. Plain lines where there is no terminal. Interrupted, it cancels nothing. Raises JobNotFound.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lorabatch_producer.batch import BatchStatus
from lorabatch_producer.client import Producer
from lorabatch_producer.console import printable
from lorabatch_producer.services import NO_WORKER, answering
from lorabatch_producer.speed import AdapterCount, adapter_counts, recent_speed

__all__ = ["Seen", "look", "watch"]

PAUSE_S = 1.0
LINE_EVERY_S = 5.0
IDLE_S = 5.0
BUSY_SHARE = 10  # a look takes at most about a tenth of the time, however large the batch
ADAPTERS_SHOWN = 20


@dataclass(frozen=True)
class Seen:
    """A batch as it stands. `jobs_per_s`: since the first look; 0: none has ended since."""

    status: BatchStatus
    adapters: list[AdapterCount]
    tokens_per_s: float
    jobs_per_s: float

    @property
    def over(self) -> bool:
        return self.status.ended == self.status.total

    @property
    def left_s(self) -> float | None:
        """At this pace; None: unknown."""
        left = self.status.total - self.status.ended
        return left / self.jobs_per_s if self.jobs_per_s else None

    @property
    def line(self) -> str:
        status, budget = self.status, self.status.budget
        parts = [
            f"{status.ended}/{status.total} done",
            f"{status.failed} failed, {status.cancelled} cancelled",
            f"{status.running} running, {status.queued} waiting",
            f"{self.tokens_per_s:.1f} tokens/s",
        ]
        if budget.max_tokens is not None:
            parts.append(f"{budget.spent_tokens} of {budget.max_tokens} tokens spent")
        if budget.max_failures is not None:
            parts.append(f"stops at {budget.max_failures} failures")
        if budget.exhausted:
            parts.append(f"stopped: {budget.exhausted}")
        elif not self.over:
            parts.append(
                "time left unknown" if self.left_s is None else f"{self.left_s:.0f} s left"
            )
        return ", ".join(parts)


def watch(producer: Producer, batch_ids: Sequence[str], console: Console) -> list[BatchStatus]:
    """Return once all jobs of these batches have ended: how."""
    started_s = time.monotonic()
    first = [look(producer, batch_id) for batch_id in batch_ids]
    took_s = time.monotonic() - started_s
    seen, asked = first, False
    live = Live(console=console, auto_refresh=False, transient=False)
    lines = _Lines(console)
    with live if console.is_terminal else contextlib.nullcontext():
        while True:
            if console.is_terminal:
                live.update(Group(*map(_drawn, seen)), refresh=True)
            else:
                lines.show(seen)
            if all(one.over for one in seen):
                return [one.status for one in seen]
            idle = not any(one.status.running for one in seen)
            if idle and not asked and time.monotonic() - started_s > IDLE_S:
                asked = True
                if not answering(producer.app()):
                    console.print(NO_WORKER, style="yellow", highlight=False)
            time.sleep(max(PAUSE_S, took_s * BUSY_SHARE))
            looked_s = time.monotonic()
            seen = [look(producer, one.status.batch_id, one, started_s) for one in first]
            took_s = time.monotonic() - looked_s


def look(
    producer: Producer, batch_id: str, first: Seen | None = None, since_s: float = 0.0
) -> Seen:
    """A batch now. `first`: the look at `since_s` of the monotonic clock."""
    status = producer.status(batch_id)
    engine = producer.ledger.engine
    before = status.ended if first is None else first.status.ended
    return Seen(
        status,
        adapter_counts(engine, batch_id),
        recent_speed(engine, batch_id, status.created_us),
        (status.ended - before) / max(time.monotonic() - since_s, 0.05),
    )


class _Lines:
    """Plain lines for logs and pipes: what is new, at most every LINE_EVERY_S."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown_s = float("-inf")
        self._ended: list[int] = []

    def show(self, seen: Sequence[Seen]) -> None:
        ended = [one.status.ended for one in seen]
        over = all(one.over for one in seen)
        early = time.monotonic() - self._shown_s < LINE_EVERY_S
        if ended == self._ended or (early and not over):
            return
        self._shown_s, self._ended = time.monotonic(), ended
        for one in seen:
            text = f"{one.status.batch_id}: {one.line}"
            self._console.print(printable(text), soft_wrap=True, markup=False, highlight=False)


def _drawn(seen: Seen) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    shown = seen.adapters[:ADAPTERS_SHOWN] if len(seen.adapters) > 1 else []
    for one in shown:
        bar = ProgressBar(total=one.total, completed=one.ended, width=30)
        name = Text(printable(one.adapter_id or "(base model)"))
        table.add_row(name, bar, Text(f"{one.ended}/{one.total}"))
    more = len(seen.adapters) - ADAPTERS_SHOWN
    if more > 0:
        table.add_row(Text(f"and {more} adapters more"))
    whole = ProgressBar(total=max(1, seen.status.total), completed=seen.status.ended, width=60)
    return Group(Text(f"batch {seen.status.batch_id}"), whole, Text(seen.line), table)
