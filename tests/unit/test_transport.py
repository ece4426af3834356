"""The worker's end of the broker, on a real server and in a real event loop."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import kombu.transport
import pytest
import redis
from kombu import Connection, Queue
from kombu.asynchronous import Hub
from kombu.transport import TRANSPORT_ALIASES

from lorabatch import Settings
from lorabatch.ledger import Message
from lorabatch.queue import make_app, send
from lorabatch_worker import transport
from lorabatch_worker.transport import Transport

UNACKED, INDEX = "unacked", "unacked_index"


class Desk:
    """A consumer of two queues, and the server."""

    def __init__(self, settings: Settings, url: str) -> None:
        self.app = make_app(settings)
        self.server = redis.Redis.from_url(url)
        self.url = url
        self.got: list[Any] = []
        self.open(0)

    def open(
        self, prefetch: int, queues: str = "lorabatch celery", prefix: str = "", **options: Any
    ) -> None:
        self.hub = Hub()
        kind = f"{Transport.__module__}:{Transport.__name__}"
        keys = {"global_keyprefix": prefix}
        self.connection = Connection(self.url, transport=kind, transport_options=keys)
        self.connection.register_with_event_loop(self.hub)
        self.channel = self.connection.default_channel
        self.channel.basic_qos(0, prefetch, False)
        names = [Queue(name) for name in queues.split()]
        consumer = self.connection.Consumer(
            names, on_message=self.got.append, accept=["json"], **options
        )
        consumer.consume()

    def send(self, *names: str, queue: str = "lorabatch") -> None:
        send(self.app, queue, [Message(name, "acme", None) for name in names])

    def run(self, rounds: int = 12) -> list[str]:
        """Let the loop go round; the ids that came meanwhile."""
        before = len(self.got)
        for _ in range(rounds):
            self.hub.call_later(0.02, lambda: None)
            next(self.hub.loop)
        return [message.headers.get("id") for message in self.got[before:]]

    def noted(self) -> tuple[int, int]:
        """Messages that the server knows to be in somebody's hands, in the hash and the index."""
        return self.server.hlen(UNACKED), self.server.zcard(INDEX)  # type: ignore[return-value]

    def close(self) -> None:
        self.connection.close()
        self.hub.close()


@pytest.fixture
def desk(settings: Settings, valkey_url: str) -> Iterator[Desk]:
    desk = Desk(settings, valkey_url)
    yield desk
    desk.close()
    desk.app.close()


def calls(desk: Desk, command: str) -> int:
    stats: Any = desk.server.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {}).get("calls", 0))


def test_all_that_there_is_room_for_comes_in_one_answer(desk: Desk) -> None:
    desk.send(*"abcdefghij")
    before = calls(desk, "eval")
    assert desk.run(3) == list("abcdefghij")
    assert calls(desk, "eval") - before <= 3
    assert desk.noted() == (10, 10)
    assert desk.server.llen("lorabatch") == 0


def test_no_more_comes_than_there_is_room_for(desk: Desk) -> None:
    desk.close()
    desk.open(prefetch=3)
    desk.send(*"abcde")
    assert desk.run() == list("abc")
    assert desk.server.llen("lorabatch") == 2
    desk.got[0].ack()
    assert desk.run() == ["d"]


def test_an_answer_has_a_size(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "FETCH_BYTES", 1)
    desk.send(*"abc")
    before = calls(desk, "eval")
    assert desk.run() == list("abc")
    assert calls(desk, "eval") - before >= 3


def test_higher_priorities_first_and_queues_in_turn(desk: Desk) -> None:
    desk.send(*"ab")
    desk.send(*"cd", queue="celery")
    for name, priority in (("low", 9), ("high", 0)):
        desk.app.send_task("t", task_id=name, queue="celery", priority=priority)
    ids = desk.run()
    assert ids[-1] == "low"
    assert set(ids[:2]) == {"a", "c"}
    assert set(ids[2:4]) == {"b", "d"}


def test_acknowledgements_go_out_together(desk: Desk) -> None:
    desk.send(*"abcdef")
    desk.run()
    before = calls(desk, "zrem")
    for message in desk.got[:4]:
        message.ack()
    assert desk.noted() == (6, 6)
    desk.run()
    assert desk.noted() == (2, 2)
    assert calls(desk, "zrem") - before == 1


def test_a_close_hands_back_what_was_not_acknowledged(desk: Desk) -> None:
    desk.send(*"abc")
    desk.run()
    desk.got[1].ack()
    desk.close()
    assert desk.noted() == (0, 0)
    desk.open(0)
    assert sorted(desk.run()) == ["a", "c"]
    assert all(message.delivery_info["redelivered"] for message in desk.got[-2:])


def test_what_a_handler_did_not_get_to_is_handed_back(desk: Desk) -> None:
    desk.close()
    desk.open(0)
    desk.send(*"abc")

    def stop(message: Any) -> None:
        raise OSError("the connection is gone")

    desk.connection.transport._callbacks["lorabatch"] = stop
    with pytest.raises(OSError, match="gone"):
        desk.run()
    assert desk.noted() == (3, 3)
    desk.close()
    desk.open(0)
    assert sorted(desk.run()) == list("abc")


def test_a_lost_connection_loses_no_acknowledgement_for_good(desk: Desk) -> None:
    desk.send(*"ab")
    desk.run()
    for message in desk.got:
        message.ack()
    desk.channel._disconnect_pools()
    desk.server.client_kill_filter(_type="normal", skipme=True)
    desk.channel.qos.send_acks()
    assert desk.noted() in {(0, 0), (2, 2)}, "told, or given out again later"


ROUTE = {"exchange": "", "routing_key": "lorabatch"}


def bad_body(**properties: Any) -> bytes:
    known = {"body_encoding": "base64", "delivery_tag": "t", "delivery_info": ROUTE}
    message = {"body": "a", "headers": {}, "properties": {**known, **properties}}
    return json.dumps(message).encode()


def good_body(**properties: Any) -> bytes:
    return bad_body(body_encoding=None, **properties)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"hello",
        b"\xff\xfe",
        b"[]",
        b'{"properties": 1}',
        b'{"properties": {"delivery_tag": "t"}}',
        b'{"properties": {"delivery_tag": 1, "delivery_info": {}}}',
        b"[" * 2000,
        bad_body(),
        bad_body(body_encoding="x"),
        bad_body().replace(b'"t"', b'"\xff"'),
        bad_body(reply_to="-").replace(b"-", b"\xff"),
        good_body(deep="-").replace(b'"-"', b"[" * 970 + b"]" * 970),
        good_body(number="-").replace(b'"-"', b"nan"),
        good_body(delivery_info={"exchange": ""}),
        good_body(delivery_info={**ROUTE, "routing_key": 7}),
        good_body(delivery_info={**ROUTE, "routing_key": "-"}).replace(b'"-"', b"1e999"),
    ],
)
def test_what_is_no_message_is_set_aside(desk: Desk, raw: bytes) -> None:
    desk.send("a")
    desk.server.lpush("lorabatch", raw)
    desk.send("b")
    assert desk.run() == ["a", "b"]
    assert desk.server.lrange("lorabatch:unreadable", 0, -1) == [raw]
    for message in desk.got:
        message.ack()
    desk.run()
    assert desk.noted() == (0, 0)


def test_text_that_is_no_unicode_is_still_a_message(desk: Desk) -> None:
    """Its prompt is refused by name further on; half an emoji must not look like no message."""
    for text in ("\ud83d", "a \\ud83d \udcff"):
        desk.app.send_task("t", kwargs={"prompt": text}, task_id="cut", queue="lorabatch")
    assert desk.run() == ["cut", "cut"]
    assert desk.got[1].payload[1] == {"prompt": "a \\ud83d \udcff"}
    assert not desk.server.exists("lorabatch:unreadable")


def test_a_route_may_be_null_or_no_text(desk: Desk) -> None:
    desk.server.lpush("lorabatch", good_body(delivery_info={**ROUTE, "exchange": None}))
    desk.server.lpush("lorabatch", good_body(delivery_info={**ROUTE, "exchange": 1e999}))
    desk.run()
    assert len(desk.got) == 2
    assert desk.server.hvals(UNACKED)[0].endswith(b',"","lorabatch"]')


def test_a_note_that_cannot_be_restored_stops_no_restore(desk: Desk) -> None:
    desk.send("a", "b")
    desk.run()
    desk.server.hset(UNACKED, "bad", b"nan")
    desk.server.hset(UNACKED, "void", json.dumps([{"properties": {}}, "", None]))
    desk.server.zadd(INDEX, dict.fromkeys(["bad", "void", *desk.channel.qos._delivered], 1))
    desk.channel.qos._delivered.clear()
    desk.channel.qos.restore_visible(interval=1)
    assert sorted(desk.run()) == ["a", "b"]
    assert desk.noted() == (2, 2)
    assert desk.server.llen("unacked:unreadable") == 2


def test_a_reply_is_waited_for_as_kombu_does_it(desk: Desk) -> None:
    """celery's mingle waits for replies once the connection is in the loop, which stands still."""
    with pytest.raises(TimeoutError):
        desk.connection.drain_events(timeout=0.05)
    timer = threading.Timer(0.3, desk.send, ["a"])
    timer.start()
    desk.connection.drain_events(timeout=5)
    timer.join()
    assert [message.headers["id"] for message in desk.got] == ["a"]
    desk.send("b")
    assert desk.run() == ["b"]
    for message in desk.got:
        message.ack()
    desk.run()
    assert desk.noted() == (0, 0)


def test_a_key_prefix_is_left_to_kombu(desk: Desk) -> None:
    desk.close()
    desk.open(0, prefix="x:")
    before = calls(desk, "eval")
    with desk.connection.Producer() as producer:
        producer.publish({}, headers={"id": "a"}, exchange="", routing_key="lorabatch")
    assert desk.run() == ["a"]
    assert calls(desk, "eval") == before
    assert desk.server.hlen("x:unacked") == 1


def test_a_process_that_used_the_broker_before_gets_this_transport(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kombu.transport, "TRANSPORT_ALIASES", dict(TRANSPORT_ALIASES))
    monkeypatch.setattr(kombu.transport, "_transport_cache", {})
    assert not isinstance(Connection(desk.url).transport, Transport)
    transport.use_in_this_process()
    assert isinstance(Connection(desk.url).transport, Transport)
    assert isinstance(Connection(desk.url.replace("redis", "rediss")).transport, Transport)


def test_a_consumer_without_acknowledgements_leaves_no_note(desk: Desk) -> None:
    desk.close()
    desk.open(0, no_ack=True)
    desk.send("a")
    assert desk.run() == ["a"]
    assert desk.noted() == (0, 0)


def test_a_server_that_refuses_is_a_lost_connection(desk: Desk) -> None:
    desk.send("a")
    desk.server.config_set("min-replicas-to-write", 1)
    try:
        with pytest.raises(redis.ConnectionError, match="refused to give messages"):
            desk.run()
    finally:
        desk.server.config_set("min-replicas-to-write", 0)
    desk.close()
    desk.open(0)
    assert desk.run() == ["a"]


def test_without_a_loop_all_is_as_kombu_does_it(desk: Desk) -> None:
    desk.close()
    with Connection(desk.url, transport=f"{Transport.__module__}:Transport") as connection:
        desk.send("a")
        message = connection.SimpleQueue("lorabatch").get(timeout=5)
        assert message.headers["id"] == "a"
        assert desk.noted() == (1, 1)
        message.ack()
        assert desk.noted() == (0, 0)
    desk.open(0)
