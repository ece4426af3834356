"""What is in the queue and cannot be read is set aside, and stops no worker."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.broker_desk import INDEX, UNACKED, BrokerDesk

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
def test_what_is_no_message_is_set_aside(broker_desk: BrokerDesk, raw: bytes) -> None:
    broker_desk.send("a")
    broker_desk.server.lpush("lorabatch", raw)
    broker_desk.send("b")
    assert broker_desk.run() == ["a", "b"]
    assert broker_desk.server.lrange("lorabatch:unreadable", 0, -1) == [raw]
    for message in broker_desk.got:
        message.ack()
    broker_desk.run()
    assert broker_desk.noted() == (0, 0)


def test_text_that_is_no_unicode_is_still_a_message(broker_desk: BrokerDesk) -> None:
    """Its prompt is refused by name further on; half an emoji must not look like no message."""
    for text in ("\ud83d", "a \\ud83d \udcff"):
        broker_desk.app.send_task("t", kwargs={"prompt": text}, task_id="cut", queue="lorabatch")
    assert broker_desk.run() == ["cut", "cut"]
    assert broker_desk.got[1].payload[1] == {"prompt": "a \\ud83d \udcff"}
    assert not broker_desk.server.exists("lorabatch:unreadable")


def test_a_route_may_be_null_or_no_text(broker_desk: BrokerDesk) -> None:
    broker_desk.server.lpush("lorabatch", good_body(delivery_info={**ROUTE, "exchange": None}))
    broker_desk.server.lpush("lorabatch", good_body(delivery_info={**ROUTE, "exchange": 1e999}))
    broker_desk.run()
    assert len(broker_desk.got) == 2
    assert broker_desk.server.hvals(UNACKED)[0].endswith(b',"","lorabatch"]')


def test_a_note_that_cannot_be_restored_stops_no_restore(broker_desk: BrokerDesk) -> None:
    broker_desk.send("a", "b")
    broker_desk.run()
    broker_desk.server.hset(UNACKED, "bad", b"nan")
    broker_desk.server.hset(UNACKED, "void", json.dumps([{"properties": {}}, "", None]))
    broker_desk.server.zadd(
        INDEX, dict.fromkeys(["bad", "void", *broker_desk.channel.qos._delivered], 1)
    )
    broker_desk.channel.qos._delivered.clear()
    broker_desk.channel.qos.restore_visible(interval=1)
    assert sorted(broker_desk.run()) == ["a", "b"]
    assert broker_desk.noted() == (2, 2)
    assert broker_desk.server.llen("unacked:unreadable") == 2
