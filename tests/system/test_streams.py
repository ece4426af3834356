"""A worker sends texts as they grow, and goes on where the broker does not take them."""

from __future__ import annotations

from shop import Shop, wait_until

from lorabatch import Job
from lorabatch.streams import piece_of, stream_key
from tests.fake_runner import fake_text


def streamed(shop: Shop, job: Job) -> str:
    entries = shop.broker.xrange(stream_key(job.job_id))
    pieces = [piece_of(job.job_id, entry) for _, entry in entries]
    text = ""
    for piece in pieces:
        assert piece.at == len(text), "none is missing, none comes twice"
        text += piece.text
    return text


def test_the_text_of_a_job_that_is_followed_is_in_the_broker(running: Shop) -> None:
    jobs = running.accept(4, tokens=10, stream=True) + running.accept(2, tokens=10)
    running.wait_ended(6)
    for job in jobs:
        assert streamed(running, job) == (fake_text(job) if job.stream else "")


def test_a_full_broker_costs_no_job(running: Shop) -> None:
    before = sum(running.ledger.counts().values())
    jobs = running.accept(3, tokens=300, stream=True)
    wait_until("they run", lambda: running.broker.exists(*(stream_key(j.job_id) for j in jobs)))
    running.broker.config_set("maxmemory", 1)
    try:
        running.wait_ended(before + 3)
    finally:
        running.broker.config_set("maxmemory", 0)
    assert running.ledger.counts() == {"succeeded": before + 3}
    running.wait_broker_empty()
