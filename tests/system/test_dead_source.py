"""A source that does not answer: its jobs wait, however many, and nobody else's."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from shop import RealWorker, Shop, model_settings, wait_until

from lorabatch import Job
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
    theirs = jobs(shop, 5 * IN_HAND, "far")
    plain = shop.generate(prompt="Hello", adapter_id="far", sampling_params={"max_new_tokens": 2})
    ours = jobs(shop, IN_HAND, None)
    ended = [job.job_id for job in ours]
    wait_until("others ended", lambda: len(shop.ledger.results(ended)) == len(ours))
    assert not shop.ledger.results([job.job_id for job in theirs])
    wait_until("others acknowledged", lambda: len(shop.ids_in_broker()) <= IN_HAND // 2)

    hub.hang.set()
    shop.wait_ended(len(theirs) + len(ours) + 1)
    found = shop.ledger.results([job.job_id for job in theirs])
    assert {result.state for result in found.values()} == {"succeeded"}
    assert plain.get(timeout=30)["adapter_version"] is not None
    assert len(shop.rows(usage_events)) == len(theirs) + len(ours) + 1
    shop.wait_broker_empty()
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.text()


def test_a_worker_that_stops_hands_back_what_it_postponed(shop: Shop, hub: HubServer) -> None:
    worker = RealWorker(shop.home / "worker.log", shop.env)
    shop.workers.append(worker)
    worker.wait_ready()
    theirs = jobs(shop, 5 * IN_HAND, "far")
    wait_until("given up for now", lambda: 0 < len(shop.ids_in_broker()) <= IN_HAND // 2)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.text()
    assert shop.ids_in_broker() == {job.job_id for job in theirs}
    assert shop.ledger.counts() == {"queued": len(theirs)}
