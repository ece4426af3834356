"""Why a job waits, in plain sentences with numbers.

Texts of the ledger are made printable; nothing is raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lorabatch.errors import AttemptsExhausted
from lorabatch.rows import moment
from lorabatch_producer.console import printable
from lorabatch_producer.services import NO_WORKER
from lorabatch_producer.why import Ahead, Bound, Facts, adapters_of

__all__ = ["lines"]

Loads = Mapping[str, Mapping[str, float]]
Places = Mapping[str, Mapping[str, str]]
PLACES = {
    "device": "on the device of",
    "memory": "in memory of",
    "disk": "in the disk cache of",
    "nowhere": "not yet with",
}


def lines(facts: Facts, workers: Loads, places: Places) -> list[str]:
    """`workers`: those that answer, each with its figures. `places`: of adapters, by worker."""
    return [printable(line) for line in _lines(facts, workers, places)]


def _lines(facts: Facts, workers: Loads, places: Places) -> Iterator[str]:
    who = f"job {facts.job_id} of tenant {facts.tenant}"
    since = {"queued": facts.submitted_us, "running": facts.started_us}
    if facts.state not in since:
        yield f"{who} has ended, {facts.state}{_since(facts, facts.finished_us)}"
        yield from _ended(facts)
        return
    yield f"{who} is {facts.state}{_since(facts, since[facts.state])}"
    if facts.state == "running":
        yield from _running(facts)
    else:
        yield from _queued(facts)
    if facts.losses:
        yield _losses(facts)
    for adapter in facts.adapters:
        yield from _adapter(facts, adapter)
    if facts.adapter_id is not None and not facts.adapters:
        yield (
            f"adapter {facts.adapter_id!r} was not registered when it was accepted: each worker "
            "takes what it has of that name"
        )
    for name in adapters_of(facts):
        yield _place(name, places.get(name, {}))
    if facts.done_by_us is not None:
        yield _deadline(facts, facts.done_by_us)
    if facts.ahead is not None:
        yield _estimate(facts.ahead)
    yield _workers(facts.queue, workers)


def _queued(facts: Facts) -> Iterator[str]:
    if facts.sent_us is None:
        yield f"it is in the ledger and waits to be fed into queue {facts.queue!r}"
    elif facts.sent_us > facts.now_us:
        later = _span(facts.sent_us - facts.now_us)
        yield f"handed back while its adapter was being fetched: it comes again in {later}"
    else:
        since = _since(facts, facts.sent_us)
        yield f"its message is in queue {facts.queue!r}{since}"
    ahead = facts.ahead
    if ahead is None:
        return
    more = "more than " if ahead.more else ""
    alike = f", and {_jobs(ahead.alike)} as old as it may" if ahead.alike else ""
    yield (
        f"{more}{_jobs(ahead.jobs)} of its tenant come before it{alike} "
        f"(its priority: {facts.priority})"
    )
    if ahead.tenants:
        share = ahead.weight / ahead.weights
        who = "1 tenant has" if ahead.tenants == 1 else f"{ahead.tenants:,} tenants have"
        yield (
            f"{who} open jobs in this queue; its own has weight {ahead.weight:g} of "
            f"{ahead.weights:g}: {share:.0%} of the tokens"
        )
    if ahead.max_running is not None:
        full = facts.sent_us is None and ahead.under_way >= ahead.max_running
        yield (
            f"its tenant may have {_jobs(ahead.max_running)} under way and has "
            f"{ahead.under_way:,}" + (": the limit is reached" if full else "")
        )


def _running(facts: Facts) -> Iterator[str]:
    worker = facts.worker or "nobody"
    if facts.begun:
        yield f"worker {worker} runs it: attempt {facts.attempts}"
    else:
        yield f"worker {worker} has fetched it ahead: attempt {facts.attempts + 1} has not begun"
    if facts.lease_expires_us is not None and facts.lease_expires_us < facts.now_us:
        ago = _span(facts.now_us - facts.lease_expires_us)
        yield f"its lease ran out {ago} ago: that worker is silent, and any other takes it over"
    if facts.cancel_requested:
        yield "it was asked to stop, and ends at its next step"


def _ended(facts: Facts) -> Iterator[str]:
    how = facts.how
    if how is None:
        return
    if how.error_code is not None:
        yield f"{how.error_code}: {how.error_message}"
    if how.finish_reason is not None:
        yield f"its text ended by {how.finish_reason}"
    yield (
        f"attempts: {facts.attempts}; it ran for {_span(how.run_us)}; "
        f"{how.input_tokens:,} + {how.output_tokens:,} tokens"
    )
    if facts.again is not None:
        yield f"its line runs again as job {facts.again}"
    elif how.error_code == AttemptsExhausted.code:
        yield f"`lorabatch dead retry {facts.job_id}` runs its request again, unless it was dropped"


def _losses(facts: Facts) -> str:
    times = "once" if facts.losses == 1 else f"{facts.losses:,} times"
    then = ": it is suspected of stopping them, and runs alone" if facts.suspect else ""
    return f"a worker that had it was lost {times}, after it had begun {facts.crashes:,}{then}"


def _adapter(facts: Facts, adapter: Bound) -> Iterator[str]:
    yield f"adapter {adapter.adapter_id!r} is bound to version {adapter.version[:12]}"
    for fault in adapter.set_aside:
        times = "once" if fault.failures == 1 else f"{fault.failures:,} times"
        left = fault.retry_us - facts.now_us
        until = "now due to be tried again"
        if left > 0:
            until = (
                f"set aside until {_time(fault.retry_us)}, for {_span(left)}: it fails until then"
            )
        yield (
            f"that version failed {times} on workers of {fault.base_model!r} and is {until} "
            f"({fault.code}: {fault.reason})"
        )


def _place(name: str, by_worker: Mapping[str, str]) -> str:
    if not by_worker:
        return f"adapter {name!r}: no worker answered whether it has it"
    shown = [
        f"{said} {', '.join(w for w, at in by_worker.items() if at == place)}"
        for place, said in PLACES.items()
        if place in by_worker.values()
    ]
    return f"adapter {name!r} is {'; '.join(shown)}"


def _deadline(facts: Facts, done_by_us: int) -> str:
    left = done_by_us - facts.now_us
    if left > 0:
        return f"it is to be done by {_time(done_by_us)}, within {_span(left)}"
    late = f"its deadline, {_time(done_by_us)}, passed {_span(-left)} ago"
    return late + (": it fails at the next look of a worker" if facts.state == "queued" else "")


def _estimate(ahead: Ahead) -> str:
    if not ahead.ended_last_minute:
        return "no estimate: nothing of its tenant ended in the last minute"
    wait = _span(round(ahead.jobs / ahead.ended_last_minute * 60e6))
    least = "at least " if ahead.more else "about "
    return (
        f"{_jobs(ahead.ended_last_minute)} of its tenant ended in the last minute: at that rate "
        f"those before it take {least}{wait}"
    )


def _workers(queue: str, workers: Loads) -> str:
    if not workers:
        return f"{NO_WORKER}, for queue {queue!r} (LORABATCH_CONSUME)"
    shown = []
    for name, load in workers.items():
        counts = [f"{load[key]:,.0f} {key}" for key in ("waiting", "running") if key in load]
        shown.append(f"{name} ({', '.join(counts)})" if counts else name)
    who = "1 worker answers" if len(shown) == 1 else f"{len(shown):,} workers answer"
    return f"{who}: {', '.join(shown)}"


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count:,} jobs"


def _since(facts: Facts, at_us: int | None) -> str:
    return "" if at_us is None else f" since {_time(at_us)} ({_span(facts.now_us - at_us)})"


def _time(at_us: int) -> str:
    return f"{moment(at_us):%Y-%m-%d %H:%M:%S} UTC"


def _span(us: int) -> str:
    seconds = max(0, us) / 1e6
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
