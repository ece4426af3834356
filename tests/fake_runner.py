"""A runner without a model, and a worker process around it: `python tests/fake_runner.py`.

Every job takes max_new_tokens steps of FAKE_STEP_S. Its text is adapter and prompt hash, so that
an output that got swapped with another job's shows. A prompt that starts with "fail" fails.
A prompt that starts with "poison" ends the process, by kill -9, when it runs, and one that starts
with "breaks" has it lose its device; one that starts with "long N" has a text of N more characters.
FAKE_RUNS names a file that gets the id of every job that starts to run. The process loses its
device at DEVICE_LOST, and hangs for good at HANGS.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabatch import Job, Result, Settings, Usage
from lorabatch.ledger import Claim, Outcome
from lorabatch.result import ErrorInfo
from lorabatch.streams import Piece
from lorabatch_worker.adapters.wanted import Wanted
from lorabatch_worker.runner import Broken, OnText, Postpone

DEVICE_LOST, HANGS = signal.SIGRTMIN, signal.SIGRTMIN + 1


def fake_text(job: Job) -> str:
    prompt = job.prompt or "".join(m.content for m in job.messages or ())
    more = int(prompt.split()[1]) if prompt.startswith("long ") else 0
    return f"{job.adapter_id}|{hashlib.sha256(prompt.encode()).hexdigest()[:16]}{'.' * more}"


@dataclass
class _Running:
    claim: Claim
    left: int


class FakeRunner:
    """Implements `lorabatch_worker.runner.Runner`."""

    description = "fake engine"
    device_lost = False
    hangs = False

    def __init__(
        self,
        slots: int = 8,
        step_s: float = 0.005,
        runs: Path | None = None,
    ) -> None:
        self.slots, self.step_s, self.runs = slots, step_s, runs
        self.last_progress_s = time.monotonic()
        self._lock = threading.Lock()
        self._waiting: deque[Claim] = deque()
        self._running: dict[str, _Running] = {}
        self._aborts: dict[str, str] = {}
        self._draining = False
        self._steps = self._step_seqs = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)

    @property
    def load(self) -> dict[str, int]:
        return {
            "waiting": len(self._waiting),
            "running": len(self._running),
            "steps": self._steps,
            "step_seqs": self._step_seqs,
        }

    def start(
        self,
        on_started: Callable[[Sequence[str]], None],
        on_finished: Callable[[Sequence[Outcome]], None],
        on_postponed: Postpone | None = None,
        on_broken: Broken = lambda _: None,
        on_text: OnText = lambda _: None,
    ) -> None:
        self._on_text = on_text
        self._on_started, self._on_finished = on_started, on_finished
        self._on_postponed, self._on_broken = on_postponed, on_broken
        self._thread.start()

    def submit(self, claims: Sequence[Claim]) -> None:
        with self._lock:
            self._waiting.extend(claims)

    def postpone(self) -> None:
        """What waits, as if its adapters were being fetched."""
        with self._lock:
            claims = list(self._waiting)
            self._waiting.clear()
        assert self._on_postponed is not None
        self._on_postponed(claims)

    def warm(self, wanted: Wanted) -> str:
        return "loaded"

    def place(self, wanted: Wanted) -> str:
        return "memory" if wanted.version is None else "disk"

    def abort(self, job_id: str, reason: str) -> None:
        with self._lock:
            if job_id in self._running or any(c.job.job_id == job_id for c in self._waiting):
                self._aborts.setdefault(job_id, reason)

    def drop(self, job_ids: Sequence[str]) -> None:
        with self._lock:
            self._waiting = deque(c for c in self._waiting if c.job.job_id not in job_ids)
            for job_id in job_ids:
                self._running.pop(job_id, None)

    def drain(self, timeout_s: float) -> list[Claim]:
        self._draining = True
        end_s = time.monotonic() + timeout_s
        while self._running and time.monotonic() < end_s:
            time.sleep(0.005)
        self._stop.set()
        self._thread.join()
        return [*(r.claim for r in self._running.values()), *self._waiting]

    def _run(self) -> None:
        while not self._stop.is_set():
            while self.hangs:
                time.sleep(0.05)
            with self._lock:
                started = self._admit()
            if started:
                self._on_started(started)
            time.sleep(self.step_s)
            if self.device_lost or self._breaks():
                self._on_broken(list(self._running))
                return
            with self._lock:
                ended = self._step()
            self.last_progress_s = time.monotonic()
            if ended:
                self._on_finished(ended)

    def _breaks(self) -> bool:
        prompts = [running.claim.job.prompt or "" for running in self._running.values()]
        return any(prompt.startswith("breaks") for prompt in prompts)

    def _admit(self) -> list[str]:
        started: list[str] = []
        suspect = any(r.claim.suspect for r in self._running.values())
        while self._waiting and len(self._running) < self.slots and not self._draining:
            if self._running and (suspect or self._waiting[0].suspect):
                break
            claim = self._waiting.popleft()
            suspect |= claim.suspect
            job_id = claim.job.job_id
            assert job_id not in self._running, f"{job_id} runs twice at once"
            self._running[job_id] = _Running(claim, claim.job.sampling_params.max_new_tokens)
            started.append(job_id)
        if started and self.runs is not None:
            with self.runs.open("a") as file:
                file.write("".join(f"{job_id}\n" for job_id in started))
        return started

    def _step(self) -> list[Outcome]:
        self._steps += bool(self._running)
        self._step_seqs += len(self._running)
        ended = []
        for claim in [c for c in self._waiting if c.job.job_id in self._aborts]:
            self._waiting.remove(claim)
            ended.append(self._outcome(claim, self._aborts.pop(claim.job.job_id)))
        for job_id, running in list(self._running.items()):
            if (running.claim.job.prompt or "").startswith("poison"):
                os.kill(os.getpid(), signal.SIGKILL)
            running.left -= 1
            self._grow(running)
            code = self._aborts.pop(job_id, None)
            if code is None and (running.claim.job.prompt or "").startswith("fail"):
                code = "engine_fault"
            if code is not None or running.left <= 0:
                del self._running[job_id]
                ended.append(self._outcome(running.claim, code))
        return ended

    def _grow(self, running: _Running) -> None:
        """As much more of its text as it has had steps."""
        job = running.claim.job
        if not job.stream:
            return
        text, steps = fake_text(job), job.sampling_params.max_new_tokens
        done = steps - running.left
        at, end = (len(text) * n // steps for n in (done - 1, done))
        self._on_text([Piece(job.job_id, at, text[at:end])])

    @staticmethod
    def _outcome(claim: Claim, code: str | None) -> Outcome:
        job = claim.job
        about: dict[str, Any] = {
            "job_id": job.job_id,
            "tenant": job.tenant,
            "adapter_id": job.adapter_id,
            "attempt": claim.attempt,
        }
        if code is not None:
            state = "cancelled" if code == "cancelled" else "failed"
            error = ErrorInfo(code="job_cancelled" if state == "cancelled" else code, message=code)
            return Outcome(claim, Result(**about, state=state, error=error))
        tokens = tuple(range(job.sampling_params.max_new_tokens))
        usage = Usage(prompt_tokens=len((job.prompt or "").split()), output_tokens=len(tokens))
        done = Result(
            **about,
            state="succeeded",
            text=fake_text(job),
            token_ids=tokens,
            finish_reason="length",
            seed=job.seed,
            usage=usage,
        )
        return Outcome(claim, done)


def fake_runner(settings: Settings) -> FakeRunner:
    runs = os.environ.get("FAKE_RUNS")
    step_s = float(os.environ.get("FAKE_STEP_S", "0.005"))
    return FakeRunner(settings.max_seqs, step_s, Path(runs) if runs else None)


def main() -> int:
    from lorabatch_worker.app import make_worker_app
    from lorabatch_worker.logs import own_logging
    from lorabatch_worker.main import run_worker

    def befalls(number: int, _: Any) -> None:
        FakeRunner.device_lost |= number == DEVICE_LOST
        FakeRunner.hangs |= number == HANGS

    for number in (DEVICE_LOST, HANGS):
        signal.signal(number, befalls)
    settings = Settings.load()
    own_logging(settings)
    app = make_worker_app(settings, fake_runner)

    @app.task(name="tests.add")
    def add(x: int, y: int) -> int:
        return x + y

    @app.task(name="tests.keep")
    def keep(*args: Any) -> list[Any]:
        return list(args)

    @app.task(name="tests.warned")
    def warned(task_id: str) -> str:
        return task_id

    @app.task(name="tests.noted")
    def noted(request: Any, error: Exception, traceback: Any) -> None:
        app.backend.mark_as_done(f"noted-{request.id}", str(error))

    return run_worker(app, settings, without_mingle=True)


if __name__ == "__main__":
    raise SystemExit(main())
