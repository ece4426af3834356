"""A worker process of the suite: `python -m tests.faults.worker`.

The fake runner's worker with test-only switches: FAULT_CLOCK names a file with the seconds that
this process's wall clock is ahead, which may change at any time; FAULT_TRAP as in traps.py;
FAULT_BUSY_S is how long SQLite waits for a lock; FAULT_STALL_S is after how long without a step an
engine is taken to hang; FAULT_TRANSPORT is JSON laid over the transport's options; FAULT_NEWER has
it be of a newer version, which knows the next schema and this task. The clock is `time.time`;
`datetime.now` keeps the machine's. SIGUSR2 has it print where its threads are.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

CLOCK_LOOK_S = 0.1


def _shift_clock(file: Path) -> None:
    true, ahead_s = time.time, [float(file.read_text())]

    def look() -> None:
        while True:
            time.sleep(CLOCK_LOOK_S)
            ahead_s[0] = float(file.read_text() or ahead_s[0])

    time.time = lambda: true() + ahead_s[0]
    threading.Thread(target=look, name="clock", daemon=True).start()


def _wait_for_locks(seconds: float) -> None:
    import sqlalchemy as sa

    def shorter(_: Any, __: Any, ___: Any, parameters: dict[str, Any]) -> None:
        if "timeout" in parameters:
            parameters["timeout"] = seconds

    sa.event.listen(sa.Engine, "do_connect", shorter)


def _transport_options(changed: dict[str, float]) -> None:
    app: Any = import_module("lorabatch_worker.app")

    original = app.make_app

    def make_app(*args: Any, **options: Any) -> Any:
        made = original(*args, **options)
        made.conf.broker_transport_options = {**made.conf.broker_transport_options, **changed}
        return made

    app.make_app = make_app


def _newer(task: str) -> None:
    app: Any = import_module("lorabatch_worker.app")
    delivery: Any = import_module("lorabatch_worker.delivery")
    delivery.VERSIONS = range(1, delivery.VERSIONS.stop + 1)

    original = app.make_app

    def run(**_: Any) -> str:
        return "done"

    def make_app(*args: Any, **options: Any) -> Any:
        made = original(*args, **options)
        made.task(run, name=task)
        return made

    app.make_app = make_app


def main() -> int:
    if clock := os.environ.get("FAULT_CLOCK"):
        _shift_clock(Path(clock))  # before anything takes `time` by name
    if busy := os.environ.get("FAULT_BUSY_S"):
        _wait_for_locks(float(busy))
    if options := os.environ.get("FAULT_TRANSPORT"):
        _transport_options(json.loads(options))
    if stall := os.environ.get("FAULT_STALL_S"):
        import_module("lorabatch_worker.pulse").STALL_MIN_S = float(stall)  # type: ignore[attr-defined]
    if task := os.environ.get("FAULT_NEWER"):
        _newer(task)
    if trap := os.environ.get("FAULT_TRAP"):
        from tests.faults.traps import lay_traps

        lay_traps(Path(trap))
    import faulthandler

    faulthandler.register(signal.SIGUSR2)
    from tests import fake_runner

    return fake_runner.main()


if __name__ == "__main__":
    raise SystemExit(main())
