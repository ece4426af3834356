"""Keys over HTTP: no route without one, whose tenant and what it is for, and when it ends."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import APIRouter, Depends
from fastapi.dependencies.models import Dependant
from fastapi.routing import iter_route_contexts

from lorabatch import Ledger, Settings
from lorabatch.http_tables import api_keys
from lorabatch.keys import SCOPES, Keys
from lorabatch_producer.server import create_app, keyed
from lorabatch_producer.server.caller import Caller, needs
from tests.asking import asking

JOB = {"prompt": "How many users?", "max_new_tokens": 8}
WAIT_S = 30.0


@pytest.fixture
def keys(database: sa.Engine) -> Keys:
    return Keys(database)


@pytest.fixture
def on(http_settings: Settings) -> Settings:
    return http_settings.model_copy(update={"http_keys": "on"})


def bearer(text: str, tenant: str | None = None) -> dict[str, str]:
    named = {} if tenant is None else {"LoraBatch-Tenant": tenant}
    return {"Authorization": f"Bearer {text}", **named}


@pytest.fixture
def bad(keys: Keys, database: sa.Engine) -> list[dict[str, str]]:
    """Headers that are nobody's: none, no key, unknown, wrong, expired, revoked."""
    (old, expired), (gone, revoked) = keys.create("acme", expires_s=60), keys.create("acme")
    keys.revoke(gone.key_id)
    with database.begin() as connection:
        mine = api_keys.c.key_id == old.key_id
        connection.execute(sa.update(api_keys).where(mine).values(expires_us=1))
    key, text = keys.create("acme")
    unknown, wrong = f"lb-{'0' * 12}-{text[-43:]}", f"lb-{key.key_id}-{'A' * 43}"
    named = [bearer(one) for one in ("", "x", unknown, wrong, expired, revoked)]
    return [{}, {"Authorization": f"Basic {text}"}, {"X-Api-Key": wrong}, *named]


async def test_no_route_without_a_key(on: Settings, bad: list[dict[str, str]]) -> None:
    app = create_app(on)
    forgotten = APIRouter()
    forgotten.add_api_route("/forgotten", lambda: "said to anybody", methods=["GET", "POST"])
    app.include_router(forgotten)
    routes = [(route.path, route.methods) for route in iter_route_contexts(app.routes)]
    asked = {
        (method, re.sub(r"{[^}]*}", "x", path or ""))
        for path, methods in routes
        for method in methods or ()
    }
    assert {("POST", "/jobs"), ("DELETE", "/jobs/x"), ("GET", "/docs")} <= asked
    assert {("GET", "/openapi.json"), ("GET", "/readyz"), ("POST", "/forgotten")} <= asked
    async with asking(app) as http:
        for method, path in sorted({*asked, ("GET", "/nothing"), ("GET", "/healthz/")}):
            answer = await http.request(method, path, content=b"{")
            if path == "/healthz":
                assert answer.status_code == 200
                continue
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
        answers = [await http.post("/jobs", json=JOB, headers=headers) for headers in bad]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].json()["code"] == "invalid_api_key"


async def test_a_body_is_not_read_without_a_key(on: Settings) -> None:
    parts = []

    async def body() -> AsyncIterator[bytes]:
        for _ in range(3):
            parts.append("read")
            yield b"x"

    async with asking(create_app(on)) as http:
        answer = await http.post("/jobs", content=body())
    assert (answer.status_code, parts) == (401, [])


async def test_a_key_says_whose_job_it_is(on: Settings, keys: Keys, ledger: Ledger) -> None:
    (_, acme), (_, globex) = keys.create("acme"), keys.create("globex")
    async with asking(create_app(on)) as http:
        job_id = (await http.post("/jobs", json=JOB, headers=bearer(acme))).json()["job_id"]
        assert ledger.states([job_id], "acme") == {job_id: "queued"}
        for headers in (bearer(acme, "acme"), {"api-key": acme}, {"X-Api-Key": acme}):
            assert (await http.get(f"/jobs/{job_id}", headers=headers)).status_code == 200
        theirs = await http.get(f"/jobs/{job_id}", headers=bearer(globex))
        assert theirs.status_code == 404
        named = await http.get(f"/jobs/{job_id}", headers=bearer(globex, "acme"))
    assert (named.status_code, named.json()["code"]) == (403, "not_allowed")


async def test_an_admin_acts_for_any_tenant(on: Settings, keys: Keys, ledger: Ledger) -> None:
    _, admin = keys.create("ops", scopes=["admin"])
    async with asking(create_app(on)) as http:
        for tenant in ("ops", "acme"):
            named = bearer(admin, None if tenant == "ops" else tenant)
            job_id = (await http.post("/jobs", json=JOB, headers=named)).json()["job_id"]
            assert ledger.states([job_id], tenant) == {job_id: "queued"}
        wrong = await http.post("/jobs", json=JOB, headers=bearer(admin, "a b"))
    assert wrong.status_code == 422


async def test_a_key_is_for_what_its_scopes_say(on: Settings, keys: Keys, ledger: Ledger) -> None:
    app = create_app(on)
    router = APIRouter()

    @router.get("/used")
    async def used(caller: Annotated[Caller, Depends(needs("usage"))]) -> str:
        return caller.tenant

    app.include_router(router)
    texts = {name: keys.create("acme", scopes=[name])[1] for name in SCOPES}
    statuses: dict[str, list[int]] = {}
    async with asking(app) as http:
        for name, text in texts.items():
            me = bearer(text)
            posted = await http.post("/jobs", json={**JOB, "job_id": name}, headers=me)
            looked = await http.get("/jobs/generate", headers=me)
            deleted = await http.delete("/jobs/generate", headers=me)
            report = await http.get("/used", headers=me)
            answers = (posted, looked, deleted, report)
            statuses[name] = [answer.status_code for answer in answers]
    assert statuses == {
        "generate": [202, 200, 200, 403],
        "read": [403, 200, 403, 403],
        "usage": [403, 403, 403, 200],
        "admin": [202, 200, 200, 200],
        "metrics": [403, 403, 403, 403],
    }
    assert ledger.counts() == {"cancelled": 1, "queued": 1}


async def test_keys_are_wanted_once_there_is_one(
    http_settings: Settings, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyed, "CACHE_S", 0.0)
    async with asking(create_app(http_settings)) as http:
        assert (await http.post("/jobs", json=JOB, headers=bearer("any"))).status_code == 202
        key, text = keys.create("acme")
        assert (await http.post("/jobs", json=JOB)).status_code == 401
        assert (await http.post("/jobs", json=JOB, headers=bearer(text))).status_code == 202
        keys.revoke(key.key_id)
        assert (await http.post("/jobs", json=JOB, headers=bearer(text))).status_code == 401
    async with asking(create_app(http_settings)) as http:
        assert (await http.post("/jobs", json=JOB)).status_code == 401, "it does not open again"
    off = http_settings.model_copy(update={"http_keys": "off"})
    async with asking(create_app(off)) as http:
        assert (await http.post("/jobs", json=JOB, headers=bearer(text))).status_code == 202


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that the database was asked about."""
    asked: list[str] = []
    real: Callable[[Keys, str], object] = Keys.check

    def check(self: Keys, text: str) -> object:
        asked.append(text)
        return real(self, text)

    monkeypatch.setattr(Keys, "check", check)
    return asked


async def look(http: httpx.AsyncClient, text: str) -> int:
    return (await http.get("/readyz", headers=bearer(text))).status_code


async def test_right_keys_are_remembered_and_no_more_of_them_than_may(
    on: Settings, keys: Keys, checks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyed, "CACHE_S", 1000.0)
    monkeypatch.setattr(keyed, "REMEMBERED", 2)
    first, second, third = (keys.create("acme")[1] for _ in range(3))
    async with asking(create_app(on)) as http:
        for text in (first, first, "wrong", "wrong", second, first, third, third, second, first):
            assert await look(http, text) == (401 if text == "wrong" else 200)
    assert checks == [first, "wrong", "wrong", second, third, first]


async def test_a_revoked_key_ends_soon(
    on: Settings, keys: Keys, checks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyed, "CACHE_S", 0.3)
    key, text = keys.create("acme")
    async with asking(create_app(on)) as http:
        assert await look(http, text) == 200
        keys.revoke(key.key_id)
        end_s = time.monotonic() + WAIT_S
        while await look(http, text) == 200:
            assert time.monotonic() < end_s
            await asyncio.sleep(0.02)
    assert checks == [text, text]


def test_no_route_that_changes_something_leaves_out_what_a_key_is_for(settings: Settings) -> None:
    changing = [
        route
        for route in iter_route_contexts(create_app(settings).routes)
        if not {"GET", "HEAD"} & (route.methods or {"GET"})
    ]
    assert {route.path for route in changing} >= {"/jobs", "/jobs/{job_id}"}
    asking_for_scope = needs.__name__ + ".<locals>."
    for route in changing:
        asked = [call.__qualname__ for call in calls(route.dependant)]
        assert any(name.startswith(asking_for_scope) for name in asked), route.path


def calls(dependant: Dependant) -> Iterator[Any]:
    for one in dependant.dependencies:
        yield one.call if hasattr(one.call, "__qualname__") else type(one.call)
        yield from calls(one)
