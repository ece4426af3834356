"""What is next for one OpenAI batch, from its status: check, accept, wait, write.

Each step may be begun again by another server at any moment. Raises Gone, what the database
raises, and LoraBatchError if the output cannot be written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorabatch import Job
from lorabatch.batches import Batches
from lorabatch.database import now_us
from lorabatch.errors import IdempotencyConflict, JobNotFound, QueueFull
from lorabatch.openai_batches import OpenAIBatches
from lorabatch.rows import moment
from lorabatch_producer.batch import Lines, file_digest
from lorabatch_producer.bulk import GoodLine
from lorabatch_producer.client import Producer
from lorabatch_producer.sending import chunked
from lorabatch_producer.server.batch_lines import check, lines_of, write_files

__all__ = ["Gone", "Held", "Steps"]

KEEP_EVERY_S = 0.25
FULL_S = 2.0
SHORTEST_S, LONGEST_S = 0.1, 5.0


class Gone(Exception):
    """The batch is not this server's any more, its status was changed, or the server stops."""


class Held:
    """A batch that this server holds."""

    def __init__(
        self, batches: OpenAIBatches, row: Any, lease_s: float, stopping: Callable[[], bool]
    ) -> None:
        self.row = row
        self._batches = batches
        self._lease_s = lease_s
        self._stopping = stopping
        self._kept_s = time.monotonic()

    def keep(self) -> None:
        """Hold it longer, if it is time to. Raises Gone."""
        if time.monotonic() - self._kept_s < KEEP_EVERY_S:
            return
        if self._stopping():
            raise Gone
        now = self._batches.keep(self.row, self._lease_s)
        if now is None or now.status != self.row.status:
            raise Gone
        self._kept_s = time.monotonic()

    def change(self, values: Mapping[str, Any], written: Sequence[Mapping[str, Any]] = ()) -> None:
        """Note what has become of it. Raises Gone."""
        row = self._batches.change(self.row, values, written)
        if row is None:
            raise Gone
        self.row = row


class Steps:
    """For one time that a batch is held."""

    def __init__(self, producer: Producer, held: Held) -> None:
        self._producer = producer
        self._ledger = producer.ledger
        self._batches = OpenAIBatches(self._ledger.engine)
        self._held = held
        self._folder = producer.settings.files_folder

    def run(self) -> float:
        """After how many seconds to look again."""
        steps = {
            "validating": self._validate,
            "in_progress": self._accept_and_wait,
            "finalizing": self._finish,
            "cancelling": self._cancel,
        }
        again_s: float | None = None
        try:
            while again_s is None and self._held.row.status in steps:
                again_s = steps[self._held.row.status]()
        except FileNotFoundError:
            self._fail("file_missing", "the batch's file is not there any more")
        except IdempotencyConflict as error:
            self._fail(error.code, str(error))
        return again_s or 0.0

    @property
    def _path(self) -> Path:
        return self._folder / str(self._held.row.input_file_id)

    def _validate(self) -> None:
        most = self._producer.settings.http_max_batch_lines
        total, errors = check(self._path, self._held.row, most, self._held.keep)
        if errors:
            self._held.change({"status": "failed", "errors": errors})
        else:
            self._held.change({"status": "in_progress", "total": total})

    def _accept_and_wait(self) -> float | None:
        if self._batches.now_us() >= self._held.row.done_by_us:
            self._cancel_jobs()
        elif self._held.row.accepted_us is None:
            started_s = time.monotonic()
            try:
                self._accept()
            except QueueFull:  # others' files are read in between
                return max(FULL_S, 4 * (time.monotonic() - started_s))
            except Gone:
                self._cancel_if_ended()
                raise
        if self._open():
            return self._pause_s()
        self._held.change({"status": "finalizing"})
        return None

    def _accept(self) -> None:
        row = self._held.row
        lines = Lines(self._producer, row.queue, again=False)
        with self._path.open("rb") as file:
            source = f"{row.input_file_id} sha256:{file_digest(file)}"
        lines.batches.add(row.batch_id, row.tenant, source)
        whole = False
        try:
            for some in chunked(self._jobs()):
                lines.accept(some)
            whole = True
        finally:
            lines.batches.count(row.batch_id, lines.accepted, 0, whole)
        lines.finish()
        self._held.change({"accepted_us": now_us()})

    def _jobs(self) -> Iterator[Job]:
        row = self._held.row
        done_by = moment(row.done_by_us)
        for line in lines_of(self._path, row, self._held.keep):
            if isinstance(line, GoodLine):  # as all were when they were checked
                yield line.job.model_copy(update={"done_by": done_by})

    def _finish(self) -> None:
        row = self._held.row
        written = write_files(self._ledger, self._folder, row, self._held.keep)
        last = "cancelled" if row.status == "cancelling" else "completed"
        ids = {column: path.name for column, path in written.files.items()}
        after_s = row.output_expires_after_s
        files = [
            {
                "file_id": path.name,
                "tenant": row.tenant,
                "purpose": "batch_output",
                "filename": f"batch_{row.batch_id}_{column.removesuffix('_file_id')}.jsonl",
                "bytes": path.stat().st_size,
                "expires_us": None if after_s is None else now_us() + after_s * 10**6,
            }
            for column, path in written.files.items()
        ]
        status = "expired" if written.expired and last == "completed" else last
        self._held.change({"status": status, **written.counts, **ids}, files)

    def _cancel(self) -> float | None:
        if self._held.row.in_progress_us is None:
            self._held.change({"status": "cancelled"})
            return None
        self._cancel_jobs()
        if self._open():
            return self._pause_s()
        self._finish()
        return None

    def _fail(self, code: str, message: str) -> None:
        error = {"code": code, "message": message, "param": None, "line": None}
        self._cancel_jobs()
        self._held.change({"status": "failed", "errors": [error]})

    def _cancel_if_ended(self) -> None:
        """Whoever had the batch meanwhile may not have seen the last lines that were accepted."""
        row = self._held.row
        now = self._batches.find(row.batch_id, row.tenant)
        if now is not None and now.status != row.status:
            self._cancel_jobs()

    def _cancel_jobs(self) -> None:
        try:
            Batches(self._ledger.engine).cancel(self._held.row.batch_id)
        except JobNotFound:
            return  # none was accepted

    def _open(self) -> int:
        counts = self._ledger.counts(self._held.row.batch_id)
        return counts.get("queued", 0) + counts.get("running", 0)

    def _pause_s(self) -> float:
        """The longer it has been under way, the less it matters."""
        row = self._held.row
        begun_us = int(row.cancelling_us or row.in_progress_us)
        age_s = (self._batches.now_us() - begun_us) / 1e6
        return min(LONGEST_S, max(SHORTEST_S, age_s / 20))
