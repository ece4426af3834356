"""How a worker starts: what its queues are for is noted once its model is loaded, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from lorabatch import Settings
from lorabatch.database import open_database
from lorabatch.errors import DatabaseNotReady, SettingsError, UnsupportedModel
from lorabatch.queues import Queues
from lorabatch.tables import queues
from lorabatch_worker import service
from lorabatch_worker.main import cli
from lorabatch_worker.runner import Runner
from tests.fake_runner import FakeRunner


@pytest.fixture
def start(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the service of a worker that drains `a` and `b`, and lets it take no message."""
    monkeypatch.setattr(service, "resolve_broker", lambda _: "redis://nowhere")
    monkeypatch.setattr(service, "check_broker", lambda _: "a broker")
    app: Any = None

    def made(factory: Callable[[Settings], Runner] = lambda _: FakeRunner()) -> None:
        mine = settings.model_copy(update={"consume": ("a", "b"), "base_model": "acme/one"})
        made = service.Service(app, mine, factory, lambda _: None, lambda: None)
        made._engine.dispose()

    return made


def test_the_help_names_every_kind_of_device() -> None:
    told = CliRunner().invoke(cli, ["--help"], env={"COLUMNS": "200"}).output
    assert "auto, cpu, cuda, cuda:N, cuda:any" in told


def test_a_worker_that_does_not_start_says_nothing_of_its_queues(
    settings: Settings, start: Callable[..., None]
) -> None:
    known = Queues(open_database(settings))

    def typo(_: Settings) -> Runner:
        assert known.list() == {}
        raise UnsupportedModel("no such model")

    with pytest.raises(UnsupportedModel):
        start(typo)
    assert known.list() == {}
    start()
    assert known.list() == {"a": "acme/one", "b": "acme/one"}


def test_a_worker_that_is_refused_loads_no_model(
    settings: Settings, start: Callable[..., None]
) -> None:
    known = Queues(open_database(settings))
    known.set("b", "acme/two")
    loaded: list[Settings] = []
    with pytest.raises(SettingsError, match="queue 'b' is for base model 'acme/two'"):
        start(loaded.append)
    assert (known.list(), loaded) == ({"b": "acme/two"}, [])


def test_a_database_that_fails_is_an_error_of_ours(
    settings: Settings, start: Callable[..., None]
) -> None:
    engine = open_database(settings)

    def drop(_: Settings) -> Runner:
        queues.drop(engine)
        return FakeRunner()

    for _ in ("when it is noted", "when it is checked"):
        with pytest.raises(DatabaseNotReady, match="does not answer: no such table: queues"):
            start(drop)
