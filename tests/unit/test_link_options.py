"""Links as they come in messages: what is one, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from lorabatch_worker.delivery import Delivery
from lorabatch_worker.links import links_in, links_of, refused_links


@pytest.fixture
def app() -> Celery:
    return Celery("w", broker="memory://", set_as_current=False)


def test_who_has_links_is_told_and_who_has_none_is_not() -> None:
    told = Delivery("a", lambda _: None, publish=False, links=links_of({"errbacks": [{}]}))
    assert told.tells
    assert not Delivery("a", lambda _: None, publish=False).tells
    assert links_of({"callbacks": None, "chain": [], "id": "a"}) is None


@pytest.mark.parametrize("options", [None, 5, "chain", [], {"chain": 5, "callbacks": "x"}])
def test_options_that_are_no_links_are_none(options: object) -> None:
    assert links_in(options) == {}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"chord": {"task": "body"}}, "a chord is not supported: its parts"),
        ({"callbacks": {"task": "x"}}, "link is not a list of task signatures"),
        ({"callbacks": [5]}, "link is not a list of task signatures"),
        ({"errbacks": [{"args": []}]}, "link_error is not a list of task signatures"),
        ({"chain": [{"task": "x", "options": 5}]}, "chain is not a list of task signatures"),
        ({"callbacks": [{"task": "save"}]}, "no task 'save' and would send it to a queue of its"),
        ({"errbacks": [{"task": "warn", "options": None}]}, "link_error: this worker has no task"),
        ({"chain": [{"task": "last"}, {"task": "next"}]}, "chain: this worker has no task 'next'"),
    ],
)
def test_links_that_cannot_be_called_are_refused(
    app: Celery, options: dict[str, Any], says: str
) -> None:
    assert says in str(refused_links(options, app))


@pytest.mark.parametrize(
    "options",
    [
        {"callbacks": None, "errbacks": None, "chain": None, "chord": None},
        {"callbacks": [{"task": "save", "options": {"queue": "theirs"}}]},
        {"callbacks": [{"task": "celery.group"}]},
        {"chain": [{"task": "last"}, {"task": "next", "options": {"routing_key": "theirs"}}]},
    ],
)
def test_links_that_somebody_will_get_are_not_refused(app: Celery, options: dict[str, Any]) -> None:
    assert refused_links(options, app) is None
    app.conf.task_routes = {"*": {"queue": "theirs"}}
    assert refused_links({"callbacks": [{"task": "save"}]}, app) is None
