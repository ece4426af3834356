"""Celery: an app that knows the name of the task and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery, group

from tests.clients.service import Service

MESSAGES = [{"role": "user", "content": "How many books are there?"}]
PARAMS = {"max_new_tokens": 24}


@pytest.fixture
def app(service: Service) -> Iterator[Celery]:
    app = Celery(
        "shop", broker=service.broker_url, backend=service.broker_url, set_as_current=False
    )
    yield app
    app.close()


def test_send_task(app: Celery) -> None:
    kwargs = {
        "adapter_id": "sql",
        "tenant": "acme",
        "messages": MESSAGES,
        "sampling_params": PARAMS,
    }
    answer = app.send_task("lorabatch.generate", kwargs=kwargs).get(timeout=120)
    assert "SELECT" in answer["text"]
    assert answer["tenant"] == "acme"


def test_group(app: Celery) -> None:
    tasks = [
        app.signature(
            "lorabatch.generate",
            kwargs={"adapter_id": name, "messages": MESSAGES, "sampling_params": PARAMS},
        )
        for name in ("sql", "pirate", "json", "html")
    ]
    answers = group(tasks, app=app).apply_async().get(timeout=120)
    assert [answer["adapter_id"] for answer in answers] == ["sql", "pirate", "json", "html"]


def test_unknown_adapter(app: Celery) -> None:
    result = app.send_task("lorabatch.generate", kwargs={"adapter_id": "nobody", "prompt": "a"})
    with pytest.raises(Exception, match="nobody"):
        result.get(timeout=120)
