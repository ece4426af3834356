"""The result backend that reads the ledger: states, waiting, and what it leaves alone."""

from __future__ import annotations

import pickle
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery, chord
from celery.exceptions import TaskRevokedError, TimeoutError
from celery.result import AsyncResult, ResultSet

from lorabatch import Job, Ledger, Settings
from lorabatch.errors import JobFailed
from lorabatch.queue import make_app
from lorabatch_producer.result_backend import LedgerBackend
from lorabatch_producer.waiting import Pauses
from tests.played_worker import by_adapter, fails, run_queued, working

WAIT_S = 30


@pytest.fixture
def books(database: sa.Engine) -> Ledger:
    return Ledger(database)


@pytest.fixture
def app(database: sa.Engine) -> Iterator[Celery]:
    """A plain client's, of a broker that it never asks."""
    url = database.url.render_as_string(hide_password=False)
    app = Celery("client", broker="memory://", backend=f"lorabatch+{url}", set_as_current=False)
    yield app
    app.backend.close()
    app.close()


def accept(books: Ledger, *job_ids: str, **fields: Any) -> None:
    books.accept([Job(job_id=job_id, prompt=f"say {job_id}", **fields) for job_id in job_ids])


def test_every_state_of_a_job_has_celerys_name(app: Celery, books: Ledger) -> None:
    accept(books, "ended")
    run_queued(books)
    accept(books, "broken")
    run_queued(books, fails)
    accept(books, "queued", "running", "cancelled")
    books.claim(["running"], "me", 60)
    books.cancel(["cancelled"])
    states = {
        "unknown": "PENDING",
        "queued": "PENDING",
        "running": "STARTED",
        "ended": "SUCCESS",
        "broken": "FAILURE",
        "cancelled": "REVOKED",
    }
    assert {name: AsyncResult(name, app=app).state for name in states} == states
    ready = {name for name in states if AsyncResult(name, app=app).ready()}
    assert ready == {"ended", "broken", "cancelled"}
    assert not AsyncResult("unknown", app=app).exists()
    assert AsyncResult("ended", app=app).date_done.year >= 2026


def test_what_get_gives_and_raises(app: Celery, books: Ledger) -> None:
    accept(books, "ended", adapter_id="pirate")
    run_queued(books)
    accept(books, "broken")
    run_queued(books, fails)
    accept(books, "cancelled")
    books.cancel(["cancelled"])
    got = AsyncResult("ended", app=app).get(timeout=WAIT_S)
    assert got == books.results(["ended"])["ended"].model_dump(mode="json")
    assert got["text"] == "pirate: say ended"
    with pytest.raises(JobFailed, match="^unknown_adapter: no adapter of that id$"):
        AsyncResult("broken", app=app).get(timeout=WAIT_S)
    with pytest.raises(TaskRevokedError, match="cancelled"):
        AsyncResult("cancelled", app=app).get(timeout=WAIT_S)
    assert isinstance(AsyncResult("broken", app=app).get(propagate=False), JobFailed)


def test_get_waits_for_the_end(app: Celery, books: Ledger) -> None:
    result = AsyncResult("later", app=app)
    looks: list[str] = []

    def looked() -> None:
        looks.append(result.state)
        if len(looks) == 1:
            accept(books, "later")
        elif len(looks) == 3:
            run_queued(books)

    meta = app.backend.wait_for("later", timeout=WAIT_S, on_interval=looked)
    assert meta["result"]["text"] == "None: say later"
    assert looks == ["PENDING"] * 3
    accept(books, "next")
    with working(books):
        got = AsyncResult("next", app=app).get(timeout=WAIT_S)
    assert got["text"] == "None: say next"


def test_waiting_ends_when_time_is_up(app: Celery, books: Ledger) -> None:
    accept(books, "slow", "other")
    with pytest.raises(TimeoutError, match=r"1 not ended after 0\.05 s"):
        AsyncResult("slow", app=app).get(timeout=0.05)
    results = ResultSet([AsyncResult(name, app=app) for name in ("slow", "other")], app=app)
    with pytest.raises(TimeoutError, match="2 not ended after 0 s"):
        results.get(timeout=0)


def test_many_are_waited_for_together(app: Celery, books: Ledger) -> None:
    names = [f"job-{i}" for i in range(20)]
    accept(books, *names)
    results = ResultSet([AsyncResult(name, app=app) for name in names], app=app)
    with working(books):
        got = results.get(timeout=WAIT_S)
    assert [value["job_id"] for value in got] == names
    seen: dict[str, Any] = {}
    results.get(timeout=WAIT_S, callback=seen.__setitem__)
    assert {name: value["text"] for name, value in seen.items()} == {
        name: f"None: say {name}" for name in names
    }


def test_one_failure_of_many_is_raised(app: Celery, books: Ledger) -> None:
    accept(books, "good")
    accept(books, "bad", adapter_id="broken")
    run_queued(books, by_adapter)
    results = ResultSet([AsyncResult(name, app=app) for name in ("good", "bad")], app=app)
    with pytest.raises(JobFailed):
        results.get(timeout=WAIT_S)
    kinds = [type(value) for value in results.get(timeout=WAIT_S, propagate=False)]
    assert kinds == [dict, JobFailed]


def test_a_uuid_is_an_id_too(app: Celery, books: Ledger) -> None:
    name = uuid.uuid4()
    accept(books, str(name))
    run_queued(books)
    assert AsyncResult(name, app=app).state == "SUCCESS"
    assert AsyncResult(name, app=app).get(timeout=WAIT_S)["job_id"] == str(name)


def test_it_writes_and_forgets_nothing(app: Celery, books: Ledger) -> None:
    accept(books, "ended")
    run_queued(books)
    app.backend.mark_as_done("nobody", {"text": "forged"})
    app.backend.mark_as_failure("ended", ValueError("forged"))
    app.backend.mark_as_revoked("ended", "forged")
    result = AsyncResult("ended", app=app)
    first = result.get(timeout=WAIT_S)
    result.forget()
    assert AsyncResult("ended", app=app).get(timeout=WAIT_S) == first
    assert AsyncResult("nobody", app=app).state == "PENDING"
    assert books.counts() == {"succeeded": 1}


def test_a_chord_is_refused_where_it_is_sent(app: Celery) -> None:
    parts = [app.signature("lorabatch.generate", kwargs={"prompt": "x"}, app=app)]
    with pytest.raises(NotImplementedError, match="wait for the group"):
        chord(parts, app.signature("body", app=app), app=app).apply_async()


def test_an_outage_is_waited_out_where_celery_is_told_to(
    app: Celery, books: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept(books, "ended")
    run_queued(books)
    assert AsyncResult("ended", app=app).ready()
    states, tries = Ledger.states, []

    def failing(ledger: Ledger, job_ids: Any) -> Any:
        tries.append(job_ids)
        if len(tries) % 3:
            raise sa.exc.OperationalError("SELECT", {}, Exception("server closed"))
        return states(ledger, job_ids)

    monkeypatch.setattr(Ledger, "states", failing)
    with pytest.raises(sa.exc.OperationalError):
        AsyncResult("ended", app=app).get(timeout=WAIT_S)
    tries.clear()
    app.backend.always_retry = True
    assert AsyncResult("ended", app=app).get(timeout=WAIT_S)["job_id"] == "ended"
    assert len(tries) == 3


def test_a_fork_opens_its_own_connections(app: Celery, books: Ledger) -> None:
    assert AsyncResult("x", app=app).state == "PENDING"
    parents = app.backend._ledger.engine.pool
    app.backend._opened_by = -1  # as if this process were the child
    assert AsyncResult("x", app=app).state == "PENDING"
    assert app.backend._ledger.engine.pool is not parents
    assert parents.checkedin() == 1, "left open for the parent"
    parents.dispose()


def test_threads_share_one(app: Celery) -> None:
    seen: list[Any] = [app.backend]
    thread = threading.Thread(target=lambda: seen.append(app.backend))
    thread.start()
    thread.join()
    assert seen[0] is seen[1]
    assert isinstance(seen[0], LedgerBackend)


def test_its_address_survives_pickling(app: Celery) -> None:
    again = pickle.loads(pickle.dumps(app.backend))
    assert again.url == app.backend.url


@pytest.mark.parametrize(
    "backend", ["lorabatch", "lorabatch_producer.result_backend:LedgerBackend"]
)
def test_without_an_address_it_is_the_database_of_our_settings(
    backend: str, settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORABATCH_HOME", str(settings.home))
    accept(ledger, "ended")
    run_queued(ledger)
    app = Celery("client", broker="memory://", backend=backend, set_as_current=False)
    assert AsyncResult("ended", app=app).get(timeout=WAIT_S)["job_id"] == "ended"
    app.backend.close()


def test_our_own_app_reads_the_ledger_if_its_settings_say_so(
    settings: Settings, valkey_url: str, ledger: Ledger
) -> None:
    app = make_app(settings.model_copy(update={"result_backend_url": "lorabatch"}))
    accept(ledger, "ended")
    run_queued(ledger)
    assert AsyncResult("ended", app=app).get(timeout=WAIT_S)["job_id"] == "ended"
    app.backend.close()
    app.close()


def test_pauses_grow_to_the_longest_and_begin_anew() -> None:
    pauses = Pauses(0.1)
    assert [round(pauses.after(0.0), 3) for _ in range(6)] == [0.02, 0.03, 0.045, 0.068, 0.1, 0.1]
    pauses.restart()
    assert pauses.after(0.0) == 0.02
    assert Pauses().after(0.001) == pytest.approx(0.1)
