"""A source that does not answer: its jobs wait, however many, and nobody else's."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from shop import RealWorker, Shop, model_settings, wait_until

from lorabatch import Job
from lorabatch.queue import TASK_NAME
from lorabatch.tables import usage_events
from tests.hub_server import REPO, HubServer

IN_HAND = 8


@pytest.fixture
def hub(tiny_adapters: dict[str, Path], tmp_path: Path) -> Iterator[HubServer]:
    """It holds its tongue."""
    folder = Path(shutil.copytree(tiny_adapters["attention"], tmp_path / "main"))
    server = HubServer(folder, folder)
    server.hang.clear()
    yield server
    server.close()


@pytest.fixture
def shop(tiny_folder: Path, hub: HubServer, tmp_path: Path) -> Iterator[Shop]:
    made = Shop(tmp_path / "home")
    made.env |= model_settings(tiny_folder)
    made.env |= {
        "LORABATCH_MAX_SEQS": "4",
        "LORABATCH_LOOKAHEAD": str(IN_HAND // 4),
        "LORABATCH_ADAPTERS": f"far={REPO}",
        "LORABATCH_RESEND_AFTER_S": "600",
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HF_HUB_ETAG_TIMEOUT": "60",
    }
    yield made
    made.close()


def jobs(shop: Shop, count: int, adapter_id: str | None) -> list[Job]:
    accepted = [
        Job(prompt=f"Hello {i}", adapter_id=adapter_id, sampling_params={"max_new_tokens": 2})
        for i in range(count)
    ]
    shop.ledger.accept(accepted)
    shop.send(accepted)
    return accepted


def test_a_dead_source_keeps_nobody_else_waiting(shop: Shop, hub: HubServer) -> None:
    worker = RealWorker(shop.home / "worker.log", shop.env)
    shop.workers.append(worker)
    worker.wait_ready()
    theirs = [job.job_id for job in jobs(shop, 3 * IN_HAND, "far")]
    asked = {"prompt": "Hello", "adapter_id": "far", "sampling_params": {"max_new_tokens": 2}}
    limits = {"expires": 600, "time_limit": 600}  # which nothing but their message knows
    plain = [shop.client.send_task(TASK_NAME, kwargs=asked, **limits) for _ in range(3 * IN_HAND)]
    theirs += [task.id for task in plain]
    wait_until("all were taken", lambda: len(shop.ledger.states(theirs)) == len(theirs))
    ours = [job.job_id for job in jobs(shop, IN_HAND, None)]
    wait_until("others ended", lambda: len(shop.ledger.results(ours)) == len(ours))
    assert not shop.ledger.results(theirs)
    assert shop.ids_in_broker() >= set(theirs), "their messages stay with the broker"

    hub.hang.set()
    shop.wait_ended(len(theirs) + len(ours))
    assert {result.state for result in shop.ledger.results(theirs).values()} == {"succeeded"}
    assert all(task.get(timeout=30)["adapter_version"] for task in plain)
    assert len(shop.rows(usage_events)) == len(theirs) + len(ours)
    shop.wait_broker_empty()
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_another_worker_gets_what_one_postponed(
    number: signal.Signals, shop: Shop, hub: HubServer
) -> None:
    first = RealWorker(shop.home / "first.log", shop.env)
    shop.workers.append(first)
    first.wait_ready()
    theirs = [job.job_id for job in jobs(shop, 3 * IN_HAND, "far")]
    queued = 3 * IN_HAND - IN_HAND // 2
    wait_until("given up for now", lambda: shop.ledger.counts().get("queued") == queued)
    first.signal(number)
    assert first.wait() == (0 if number == signal.SIGTERM else -number), first.text()
    hub.hang.set()
    second = RealWorker(shop.home / "second.log", shop.env)
    shop.workers.append(second)
    shop.wait_ended(len(theirs))
    assert {result.state for result in shop.ledger.results(theirs).values()} == {"succeeded"}
    assert len(shop.rows(usage_events)) == len(theirs)
