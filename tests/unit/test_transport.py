"""The worker's end of the broker_desk, on a real server and in a real event loop."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import kombu.transport
import pytest
import redis
from kombu import Connection
from kombu.transport import TRANSPORT_ALIASES

from lorabatch_worker import transport
from lorabatch_worker.transport import Transport
from lorabatch_worker.visibility import hide
from tests.broker_desk import INDEX, BrokerDesk
from tests.faults.waiting import until


def test_all_that_there_is_room_for_comes_in_one_answer(broker_desk: BrokerDesk) -> None:
    broker_desk.send(*"abcdefghij")
    before = broker_desk.calls("eval")
    assert broker_desk.run(3) == list("abcdefghij")
    assert broker_desk.calls("eval") - before <= 3
    assert broker_desk.noted() == (10, 10)
    assert broker_desk.server.llen("lorabatch") == 0


def test_no_more_comes_than_there_is_room_for(broker_desk: BrokerDesk) -> None:
    broker_desk.close()
    broker_desk.open(prefetch=3)
    broker_desk.send(*"abcde")
    assert broker_desk.run() == list("abc")
    assert broker_desk.server.llen("lorabatch") == 2
    broker_desk.got[0].ack()
    assert broker_desk.run() == ["d"]


def test_an_answer_has_a_size(broker_desk: BrokerDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "FETCH_BYTES", 1)
    broker_desk.send(*"abc")
    before = broker_desk.calls("eval")
    assert broker_desk.run() == list("abc")
    assert broker_desk.calls("eval") - before >= 3


def test_higher_priorities_first_and_queues_in_turn(broker_desk: BrokerDesk) -> None:
    broker_desk.send(*"ab")
    broker_desk.send(*"cd", queue="celery")
    for name, priority in (("low", 9), ("high", 0)):
        broker_desk.app.send_task("t", task_id=name, queue="celery", priority=priority)
    ids = broker_desk.run()
    assert ids[-1] == "low"
    assert set(ids[:2]) == {"a", "c"}
    assert set(ids[2:4]) == {"b", "d"}


def test_acknowledgements_go_out_together(broker_desk: BrokerDesk) -> None:
    broker_desk.send(*"abcdef")
    broker_desk.run()
    before = broker_desk.calls("zrem")
    for message in broker_desk.got[:4]:
        message.ack()
    assert broker_desk.noted() == (6, 6)
    broker_desk.run()
    assert broker_desk.noted() == (2, 2)
    assert broker_desk.calls("zrem") - before == 1


def test_a_close_hands_back_what_was_not_acknowledged(broker_desk: BrokerDesk) -> None:
    broker_desk.send(*"abc")
    broker_desk.run()
    broker_desk.got[1].ack()
    broker_desk.close()
    assert broker_desk.noted() == (0, 0)
    broker_desk.open(0)
    assert sorted(broker_desk.run()) == ["a", "c"]
    assert all(message.delivery_info["redelivered"] for message in broker_desk.got[-2:])


def test_what_a_handler_did_not_get_to_is_handed_back(broker_desk: BrokerDesk) -> None:
    broker_desk.close()
    broker_desk.open(0)
    broker_desk.send(*"abc")

    def stop(message: Any) -> None:
        raise OSError("the connection is gone")

    broker_desk.connection.transport._callbacks["lorabatch"] = stop
    with pytest.raises(OSError, match="gone"):
        broker_desk.run()
    assert broker_desk.noted() == (3, 3)
    broker_desk.close()
    broker_desk.open(0)
    assert sorted(broker_desk.run()) == list("abc")


def test_acknowledgements_that_the_server_refused_come_with_the_next_delivery(
    broker_desk: BrokerDesk,
) -> None:
    broker_desk.send(*"ab")
    broker_desk.run()
    for message in broker_desk.got:
        message.ack()
    broker_desk.server.config_set("min-replicas-to-write", 1)
    try:
        broker_desk.channel.qos.send_acks()
    finally:
        broker_desk.server.config_set("min-replicas-to-write", 0)
    assert broker_desk.noted() == (2, 2)
    broker_desk.server.zadd(INDEX, dict.fromkeys(broker_desk.server.zrange(INDEX, 0, -1), 1))
    broker_desk.channel.qos.restore_visible(interval=1)
    assert sorted(broker_desk.run()) == ["a", "b"]
    for message in broker_desk.got[2:]:
        message.ack()
    for _ in range(50):  # a busy machine may be late for a timer
        broker_desk.run()
        if broker_desk.noted() == (0, 0):
            break
    assert broker_desk.noted() == (0, 0)


def test_a_reply_is_waited_for_as_kombu_does_it(broker_desk: BrokerDesk) -> None:
    """celery's mingle waits for replies once the connection is in the loop, which stands still."""
    with pytest.raises(TimeoutError):
        broker_desk.connection.drain_events(timeout=0.05)
    timer = threading.Timer(0.3, broker_desk.send, ["a"])
    timer.start()
    broker_desk.connection.drain_events(timeout=5)
    timer.join()
    assert [message.headers["id"] for message in broker_desk.got] == ["a"]
    broker_desk.send("b")
    assert broker_desk.run() == ["b"]
    for message in broker_desk.got:
        message.ack()
    broker_desk.run()
    assert broker_desk.noted() == (0, 0)


def test_a_connection_that_is_gone_leaves_nothing_in_the_loop(broker_desk: BrokerDesk) -> None:
    rounds = len(broker_desk.hub.on_tick)
    gone = weakref.ref(broker_desk.connection.transport)
    for _ in range(3):
        broker_desk.connection.collect()
        broker_desk.connection.register_with_event_loop(broker_desk.hub)
    gc.collect()
    assert len(broker_desk.hub.on_tick) == rounds
    assert gone() is None


def test_a_close_that_the_server_did_not_answer_is_a_lost_connection(
    broker_desk: BrokerDesk,
) -> None:
    broker_desk.send("a", "b")
    assert broker_desk.run() == ["a", "b"]
    broker_desk.got[0].ack()
    kept = broker_desk.connection.transport.client
    broker_desk.channel._disconnect_pools()  # so far does kombu come
    broker_desk.connection.transport.client = None
    broker_desk.channel.qos.send_acks()
    with pytest.raises(redis.ConnectionError, match="was closed"):
        broker_desk.channel.close()
    assert broker_desk.noted() == (2, 2), "they come again when their time is over"
    broker_desk.connection.transport.client = kept


def test_who_is_cut_off_while_giving_messages_back_stops_the_others_for_seconds_only(
    broker_desk: BrokerDesk,
) -> None:
    broker_desk.close()
    broker_desk.open(0, queues="lorabatch")
    broker_desk.send("a")
    assert broker_desk.run() == ["a"]
    broker_desk.server.zadd(INDEX, dict.fromkeys(broker_desk.server.zrange(INDEX, 0, -1), 1))
    options = broker_desk.app.conf.broker_transport_options
    expire_s = options["unacked_mutex_expire"]
    assert broker_desk.server.lock("unacked_mutex", timeout=expire_s).acquire(blocking=False)
    qos = broker_desk.channel.qos
    until("given back", lambda: qos.restore_visible(interval=1) or broker_desk.run(), 15.0)
    assert [message.headers["id"] for message in broker_desk.got] == ["a", "a"]


def test_a_key_prefix_is_left_to_kombu(broker_desk: BrokerDesk) -> None:
    broker_desk.close()
    broker_desk.open(0, prefix="x:")
    before = broker_desk.calls("eval")
    with broker_desk.connection.Producer() as producer:
        producer.publish({}, headers={"id": "a"}, exchange="", routing_key="lorabatch")
    assert broker_desk.run() == ["a"]
    assert broker_desk.calls("eval") == before
    assert broker_desk.server.hlen("x:unacked") == 1


def test_a_process_that_used_the_broker_before_gets_this_transport(
    broker_desk: BrokerDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kombu.transport, "TRANSPORT_ALIASES", dict(TRANSPORT_ALIASES))
    monkeypatch.setattr(kombu.transport, "_transport_cache", {})
    assert not isinstance(Connection(broker_desk.url).transport, Transport)
    transport.use_in_this_process()
    assert isinstance(Connection(broker_desk.url).transport, Transport)
    assert isinstance(Connection(broker_desk.url.replace("redis", "rediss")).transport, Transport)


def test_a_consumer_without_acknowledgements_leaves_no_note(broker_desk: BrokerDesk) -> None:
    broker_desk.close()
    broker_desk.open(0, no_ack=True)
    broker_desk.send("a")
    assert broker_desk.run() == ["a"]
    assert broker_desk.noted() == (0, 0)


def test_a_server_that_refuses_is_a_lost_connection(broker_desk: BrokerDesk) -> None:
    broker_desk.send("a")
    broker_desk.server.config_set("min-replicas-to-write", 1)
    try:
        with pytest.raises(redis.ConnectionError, match="refused to give messages"):
            broker_desk.run()
    finally:
        broker_desk.server.config_set("min-replicas-to-write", 0)
    broker_desk.close()
    broker_desk.open(0)
    assert broker_desk.run() == ["a"]


def test_without_a_loop_all_is_as_kombu_does_it(broker_desk: BrokerDesk) -> None:
    broker_desk.close()
    with Connection(broker_desk.url, transport=f"{Transport.__module__}:Transport") as connection:
        broker_desk.send("a")
        message = connection.SimpleQueue("lorabatch").get(timeout=5)
        assert message.headers["id"] == "a"
        assert broker_desk.noted() == (1, 1)
        message.ack()
        assert broker_desk.noted() == (0, 0)
    broker_desk.open(0)


def test_a_hidden_message_comes_again_later_and_holds_no_place(broker_desk: BrokerDesk) -> None:
    broker_desk.close()
    broker_desk.open(prefetch=1)
    broker_desk.send("a", "b")
    assert broker_desk.run() == ["a"]
    hide(broker_desk.channel, broker_desk.got[0].delivery_tag, 5.0)
    assert broker_desk.run() == ["b"], "its place is free"
    score = dict(broker_desk.server.zrange(INDEX, 0, -1, withscores=True))
    tag = broker_desk.got[0].delivery_tag.encode()
    due = score[tag] + broker_desk.channel.visibility_timeout
    assert score[broker_desk.got[1].delivery_tag.encode()] + 60 > due > score[tag]
    assert broker_desk.noted() == (2, 2), "the server has it"


def test_what_is_hidden_is_said_in_one_call(broker_desk: BrokerDesk) -> None:
    broker_desk.send(*"abcdef")
    broker_desk.run()
    before = {command: broker_desk.calls(command) for command in ("zadd", "zrem")}
    for message in broker_desk.got[1:]:
        hide(broker_desk.channel, message.delivery_tag, 5.0)
    broker_desk.got[0].ack()
    broker_desk.run()
    assert {c: broker_desk.calls(c) - n for c, n in before.items()} == {"zadd": 1, "zrem": 1}
    assert broker_desk.noted() == (5, 5)


def test_what_was_hidden_at_a_close_is_not_handed_back(broker_desk: BrokerDesk) -> None:
    broker_desk.send("a", "b")
    broker_desk.run()
    hide(broker_desk.channel, broker_desk.got[0].delivery_tag, 5.0)
    broker_desk.close()
    broker_desk.open(0)
    assert broker_desk.run() == ["b"]
    due = broker_desk.server.zscore(INDEX, broker_desk.got[0].delivery_tag)
    assert due < broker_desk.server.zscore(INDEX, broker_desk.got[1].delivery_tag) - 60


def test_one_that_cannot_be_hidden_is_renewed_no_more(
    broker_desk: BrokerDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any, **__: Any) -> Any:
        raise redis.ConnectionError

    broker_desk.send("a")
    assert broker_desk.run() == ["a"]
    tag = broker_desk.got[0].delivery_tag
    with monkeypatch.context() as patched:
        patched.setattr(broker_desk.channel, "conn_or_acquire", lost)
        hide(broker_desk.channel, tag, 5.0)
        broker_desk.run()
    qos = broker_desk.channel.qos
    assert tag not in [t for t in qos._delivered if t not in qos._dirty]
