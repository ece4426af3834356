"""The sweeper finds accepted jobs that no message leads to, on a real broker and ledger."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from lorabatch import Job, Ledger, Settings
from lorabatch.ledger import Message
from lorabatch.queue import lane, make_app, send
from lorabatch_worker.live import LiveJobs
from lorabatch_worker.sweeper import Sweeper, task_id_of


@pytest.fixture
def broker(valkey_url: str) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(valkey_url)
    yield client
    client.close()


def test_the_sweeper_sends_what_is_nowhere_and_nothing_else(
    settings: Settings, ledger: Ledger, broker: redis.Redis
) -> None:
    now = settings.model_copy(update={"resend_after_s": -1.0})
    app = make_app(settings)
    live = LiveJobs()
    names = ["queued", "given_out", "live", "nowhere", "crashed", "leased"]
    ledger.accept([Job(job_id=name, prompt="x") for name in names], as_sent=True)
    live.add(ledger.claim(["live"], "me", -1)["live"], [])
    ledger.claim(["crashed"], "gone", -1)
    ledger.claim(["leased"], "other", 600)
    messages = {name: Message(name, "default", None) for name in names}
    mine = lane(settings.queue, "default")
    send(app, settings.queue, [messages["given_out"], messages["crashed"]])
    for name in ("given_out", "crashed"):
        broker.hset("unacked", name, b'[%s, "", "q"]' % broker.rpop(mine))
    send(app, settings.queue, [messages["queued"]])
    sweeper = Sweeper(app, now, ledger, live)
    assert sweeper.sweep() == 2
    assert sweeper.sweep() == 0
    sent = {task_id_of(raw) for raw in broker.lrange(mine, 0, -1)}
    assert sent == {"queued", "nowhere", "crashed"}
    app.close()
