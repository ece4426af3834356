"""The rows of the fault matrix that are tried, by number."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from tests.faults.kinds import (
    brokers,
    cancels,
    clocks,
    databases,
    devices,
    disks,
    files,
    floods,
    keys,
    kills,
    memory,
    poison,
    stops,
    strangers,
)
from tests.faults.kinds.upgrades import migrated
from tests.faults.observed import Fault
from tests.faults.traps import BOUNDARIES

__all__ = ["CASES", "Case"]

BOTH = ("sqlite", "postgresql")


@dataclass(frozen=True)
class Case:
    """A fault of a row. `databases`: where it can be made. `short`: every CI run tries it."""

    row: int
    name: str
    fault: Fault
    databases: tuple[str, ...] = BOTH
    short: bool = True


OFTEN = ("popped", "before-commit", "committed", "acknowledging")  # tried in every CI run
TERM, QUIT = signal.SIGTERM, signal.SIGQUIT

CASES = (
    Case(1, "kill -9, at random", kills.kill_sometime, short=False),
    *(
        Case(1, f"kill -9, {boundary}", kills.kill_at(boundary), short=boundary in OFTEN)
        for boundary in BOUNDARIES
    ),
    Case(2, "SIGTERM", stops.stop_by(TERM)),
    Case(2, "SIGTERM twice", stops.stop_by(TERM, TERM), short=False),
    Case(2, "SIGTERM, SIGQUIT", stops.stop_by(TERM, QUIT)),
    Case(2, "SIGQUIT", stops.stop_by(QUIT), short=False),
    Case(3, "broker restarted empty", brokers.restart_empty),
    Case(3, "FLUSHALL", brokers.flush),
    Case(4, "5 TCP resets", brokers.reset_often),
    Case(4, "half-open connections", brokers.half_open, short=False),
    Case(4, "partition, to the broker", brokers.partition(to_server=True), short=False),
    Case(4, "partition, from the broker", brokers.partition(to_client=True), short=False),
    Case(4, "partition, both ways", brokers.partition(to_server=True, to_client=True)),
    Case(5, "broker full", memory.broker_full(), short=False),
    Case(5, "broker full, connections lost", memory.broker_full(reconnect=True)),
    Case(6, "database refuses", databases.refused, ("postgresql",)),
    Case(6, "database locked for seconds", databases.locked, ("sqlite",)),
    Case(7, "deadlock (40P01)", databases.deadlock, ("postgresql",)),
    Case(7, "serialization failure (40001)", databases.not_serialized, ("postgresql",)),
    Case(7, "cut after COMMIT was sent", databases.commit_cut, ("postgresql",)),
    Case(7, "locked again and again", databases.locked_often, ("sqlite",), short=False),
    Case(8, "database's disk full", disks.small_disk, disks.DATABASES, short=False),
    Case(8, "disk full (53100)", disks.refused, ("postgresql",)),
    Case(9, "device lost", devices.lost),
    Case(9, "engine hangs", devices.hung, short=False),
    Case(10, "poison job", poison.poison, short=False),
    Case(14, "clocks 10 min off", clocks.off, short=False),
    Case(14, "clock steps back 1 h", clocks.stepped),
    Case(15, "a key 100 times at once", keys.at_once, short=False),
    Case(15, "producer killed after its commit", keys.killed("accepted")),
    Case(15, "producer killed before it sends", keys.killed("noted"), short=False),
    Case(16, "SIGSTOP, at random", stops.sleep_sometime, short=False),
    Case(16, "SIGSTOP, outcome not yet written", stops.sleep_at("ended")),
    Case(16, "SIGSTOP, before commit", stops.sleep_at("before-commit"), short=False),
    Case(17, "more jobs than may wait", floods.capped, short=False),
    Case(17, "results nobody fetches", floods.results_left, short=False),
    Case(19, "bulk file, kill -9 at random", files.submitted(), short=False),
    Case(19, "bulk file, kill -9, accepted", files.submitted("accepted")),
    Case(19, "bulk file, kill -9, noted", files.submitted("noted"), short=False),
    Case(20, "cancelled while queued", cancels.queued, short=False),
    Case(20, "cancelled while running", cancels.running),
    Case(20, "cancelled at the commit", cancels.racing),
    Case(21, "message of a newer schema", strangers.newer_message),
    Case(21, "row of a newer schema", strangers.newer_row),
    Case(21, "unknown task", strangers.unknown_task),
    Case(22, "schema upgraded under load", migrated),
)
