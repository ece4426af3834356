"""The examples, started as their readers do, beside a worker around the fake runner."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from shop import Shop, wait_until

from tests.models import ROOT
from tests.postgres import drop_database, fresh_database

EXAMPLES = ROOT / "examples"
DJANGO = EXAMPLES / "django_app"
WITHOUT_US = """
import runpy, sys
sys.modules.update(lorabatch=None, lorabatch_producer=None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WAIT_S = 60


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def market(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shop]:
    """A shop whose database is Django's: that one migrates first. One worker runs."""
    home = tmp_path_factory.mktemp("examples")
    url, server = f"sqlite:///{home}/db.sqlite3", None
    if request.param == "postgresql":
        server = request.getfixturevalue("postgres_server")
        url = fresh_database(server)
    python("manage.py", "migrate", cwd=DJANGO, LORABATCH_DATABASE_URL=url)
    shop = Shop(home, url)
    shop.start().wait_ready()
    yield shop
    shop.close()
    if server is not None:
        drop_database(server, url)


def environment(**more: str) -> dict[str, str]:
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {**kept, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)), **more}


def python(*command: str, cwd: Path = EXAMPLES, **env: str) -> str:
    """What a command that ends prints."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextlib.contextmanager
def serving(shop: Shop, cwd: Path, *command: str) -> Iterator[httpx.Client]:
    """A server of an example, and a browser at it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    asked = [sys.executable, *(part.replace("PORT", port) for part in command)]
    env = environment(**shop.env, LORABATCH_BROKER_URL=shop.url)
    log = shop.home / f"{cwd.name}.log"
    with (
        log.open("w") as file,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S) as browser,
        subprocess.Popen(asked, cwd=cwd, env=env, stdout=file, stderr=file) as server,
    ):

        def answers() -> bool:
            assert server.poll() is None, log.read_text()
            with contextlib.suppress(httpx.TransportError):
                return bool(browser.get("/"))
            return False

        try:
            wait_until("the example answers", answers, WAIT_S, log.read_text)
            yield browser
        finally:
            server.terminate()


def test_a_celery_app_that_knows_only_the_name(market: Shop) -> None:
    script = str(EXAMPLES / "celery_app.py")
    url = market.url
    said = python("-c", WITHOUT_US, script, BROKER_URL=url, ADAPTER_ID="pirate")
    first, second, third = said.splitlines()
    assert re.fullmatch(r"'pirate\|[0-9a-f]{16}', 64 tokens", first)
    assert second == "read again by its id: SUCCESS"
    assert third == "the second one was cancelled"


def test_django_asks_and_reads_from_its_own_database(market: Shop) -> None:
    with serving(market, DJANGO, "manage.py", "runserver", "--noreload", "PORT") as browser:
        form = browser.get("/").text
        token = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', form)[0]

        def ask(prompt: str, adapter_id: str) -> str:
            asked = {"csrfmiddlewaretoken": token, "prompt": prompt, "adapter_id": adapter_id}
            answer = browser.post("/ask", data=asked)
            assert answer.status_code == 302, answer.text
            page = answer.headers["location"]
            return wait_until("an end", lambda: ended(browser.get(page)), WAIT_S)

        assert re.fullmatch(r"text: sql\|[0-9a-f]{16}", ask("How many users?", "sql"))
        assert ask("How?", "../sql").startswith("error: invalid_job: ")
        assert "How many users?" in browser.get("/").text
    columns = sa.text("SELECT count(*) FROM shop_question JOIN jobs USING (job_id)")
    with market.ledger.engine.connect() as connection:
        assert connection.scalar(columns) == 2
    check = ("manage.py", "makemigrations", "--check")
    said = python(*check, cwd=DJANGO, LORABATCH_DATABASE_URL=market.env["LORABATCH_DATABASE_URL"])
    assert said == "No changes detected\n"


def ended(page: httpx.Response) -> str | None:
    assert page.status_code == 200, page.text
    found = re.search(r'<p id="(text|error)">(.*)</p>', page.text)
    return f"{found[1]}: {found[2]}" if found else None


def test_fastapi_answers_later_or_piece_by_piece(market: Shop) -> None:
    uvicorn = ("-m", "uvicorn", "app:app", "--port", "PORT")
    with serving(market, EXAMPLES / "fastapi_app", *uvicorn) as browser:
        asked = {"prompt": "long 2000", "adapter_id": "sql", "max_new_tokens": 200}
        accepted = browser.post("/texts", json=asked)
        place = accepted.headers["location"]
        assert (accepted.status_code, browser.get(place).status_code) == (202, 202)
        events = list(read_events(browser.get(f"{place}/events").text))
        assert [name for name, _ in events[-2:]] == ["text", "end"]
        pieces = [data for name, data in events if name == "text"]
        answer = browser.get(place)
        assert (answer.status_code, answer.json()["text"]) == (200, "".join(pieces))
        assert len(pieces) > 5
        assert browser.get("/texts/nobodys").status_code == 404
        assert browser.get("/texts/nobodys/events").status_code == 404
        refused = browser.post("/texts", json={**asked, "adapter_id": "../sql"})
        assert (refused.status_code, "adapter_id" in refused.text) == (422, True)
        job_id = browser.post("/texts", json={**asked, "max_new_tokens": 20_000}).json()["id"]
        market.ledger.cancel([job_id])
        ((name, why),) = list(read_events(browser.get(f"/texts/{job_id}/events").text))[-1:]
        assert (name, why) == ("error", f"job {job_id!r} was cancelled")


def read_events(text: str) -> Iterator[tuple[str, Any]]:
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n")
        yield name.removeprefix("event: "), json.loads(data.removeprefix("data: "))
