"""The numbers of a server, as Prometheus reads them: they add up, and name no tenant."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest

from lorabatch import Job, Ledger, Settings
from lorabatch.keys import Keys
from lorabatch_producer.server import create_app, metrics
from lorabatch_producer.server.exposition import Metric, Sample, exposed
from tests.asking import asking
from tests.played_worker import run_queued

JOB = {"prompt": "How many users?", "max_new_tokens": 8}
URL = "https://hooks.example/"
LINE = re.compile(r'([a-z_]+)(\{(?:[a-z]+="(?:[^"\\\n]|\\[\\"n])*",?)*\}) (\S+)')
WAIT_S = 30.0


@pytest.fixture(autouse=True)
def _looks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "LOOK_S", 0.0)


def numbers(text: str) -> dict[str, float]:
    """By name and labels; each name has its HELP and TYPE before it."""
    found: dict[str, float] = {}
    known: dict[str, str] = {}
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith("# "):
            _, what, name, rest = line.split(" ", 3)
            known[name] = rest
            assert what in ("HELP", "TYPE")
            continue
        parts = LINE.fullmatch(line)
        assert parts, line
        assert re.sub("_(bucket|sum|count)$", "", parts[1]) in known, line
        assert parts[1] + parts[2] not in found, "twice"
        found[parts[1] + parts[2]] = float(parts[3])
    return found


async def read(http: httpx.AsyncClient) -> dict[str, float]:
    answer = await http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return numbers(answer.text)


def requests(method: str, route: str, status: int) -> str:
    labels = f'method="{method}",route="{route}",status="{status}"'
    return f"lorabatch_http_requests_total{{{labels}}}"


async def test_requests_are_counted_by_route_and_status(
    http_settings: Settings, ledger: Ledger
) -> None:
    async with asking(create_app(http_settings)) as http:
        ids = [(await http.post("/jobs", json=JOB)).json()["job_id"] for _ in range(3)]
        for path in (*(f"/jobs/{job_id}" for job_id in ids), "/jobs/none", "/nowhere/at/all"):
            await http.get(path)
        await http.post("/jobs", json={})
        await http.request("BREW", "/jobs")
        found = await read(http)
        again = await read(http)
    wanted = {
        requests("POST", "/jobs", 202): 3,
        requests("POST", "/jobs", 422): 1,
        requests("GET", "/jobs/{job_id}", 200): 3,
        requests("GET", "/jobs/{job_id}", 404): 1,
        requests("GET", "none", 404): 1,
    }
    assert {name: found[name] for name in wanted} == wanted
    assert any('method="other"' in name for name in found)
    assert "BREW" not in str(found)
    assert found["lorabatch_http_requests_under_way{}"] == 1
    assert again[requests("GET", "/metrics", 200)] == 1
    assert found["lorabatch_jobs_accepted_total{}"] == 3
    seconds = 'lorabatch_http_request_seconds_{}{{route="/jobs/{{job_id}}"{}}}'
    buckets = [
        number
        for name, number in found.items()
        if name.startswith(seconds.format("bucket", "")[:-1])
    ]
    assert buckets == sorted(buckets)
    assert buckets[-1] == found[seconds.format("count", "")] == 4
    assert 0 < found[seconds.format("sum", "")] < 60
    assert len(buckets) == len(metrics.BOUNDS_S) + 1


async def test_what_waits_is_counted_by_queue(http_settings: Settings, ledger: Ledger) -> None:
    def some(number: int, queue: str, **fields: str) -> list[str]:
        accepted = [Job.parse({"prompt": "hi", "tenant": "secret-name", **fields})] * 1
        more = [Job.parse({"prompt": "hi", **fields}) for _ in range(number - 1)]
        return list(ledger.accept([*accepted, *more], queue=queue))

    some(3, "small")
    ended = some(2, "small", webhook=URL)
    running = some(2, 'odd"\\name')
    run_queued_ids(ledger, ended)
    ledger.claim(running[:1], "w", 60)
    off = http_settings.model_copy(update={"webhook_senders": 0})
    async with asking(create_app(off)) as http:
        found = await read(http)
        text = (await http.get("/metrics")).text
    odd = 'queue="odd\\"\\\\name"'
    wanted = {
        'lorabatch_jobs{queue="small",state="queued"}': 3,
        'lorabatch_jobs{queue="small",state="running"}': 0,
        f'lorabatch_jobs{{{odd},state="queued"}}': 1,
        f'lorabatch_jobs{{{odd},state="running"}}': 1,
        "lorabatch_webhooks_waiting{}": 2,
        "lorabatch_webhooks_failed{}": 0,
    }
    assert {name: number for name, number in found.items() if name in wanted} == wanted
    assert "secret-name" not in text


def run_queued_ids(ledger: Ledger, job_ids: list[str]) -> None:
    from lorabatch.ledger import Outcome
    from tests.played_worker import succeeds

    claims = ledger.claim(job_ids, "played", 60)
    ledger.record([Outcome(claim, succeeds(claim)) for claim in claims.values()])


async def test_requests_that_wait_are_counted(http_settings: Settings, ledger: Ledger) -> None:
    async with asking(create_app(http_settings)) as http:
        job_id = (await http.post("/jobs", json=JOB)).json()["job_id"]
        waiting = asyncio.create_task(http.get(f"/jobs/{job_id}?wait_s=60"))
        async with asyncio.timeout(WAIT_S):
            while (await read(http))["lorabatch_requests_waiting{}"] != 1:
                await asyncio.sleep(0.01)
        run_queued(ledger)
        assert (await waiting).json()["state"] == "succeeded"
        assert (await read(http))["lorabatch_requests_waiting{}"] == 0


async def test_it_is_behind_a_key_of_its_own(http_settings: Settings, ledger: Ledger) -> None:
    keys = Keys(ledger.engine)
    texts = {name: keys.create("acme", scopes=[name])[1] for name in ("generate", "metrics")}
    on = http_settings.model_copy(update={"http_keys": "on"})
    async with asking(create_app(on)) as http:
        said = {}
        for name, text in {**texts, "none": "x"}.items():
            answer = await http.get("/metrics", headers={"Authorization": f"Bearer {text}"})
            said[name] = answer.status_code
    assert said == {"generate": 403, "metrics": 200, "none": 401}


def test_texts_are_escaped() -> None:
    odd = 'a"b\\c\nd'
    metric = Metric("m", "gauge", "back\\slash\nline", [Sample(0.1, {"x": odd}), Sample(3, {})])
    assert exposed([metric]).split("\n") == [
        "# HELP m back\\\\slash\\nline",
        "# TYPE m gauge",
        'm{x="a\\"b\\\\c\\nd"} 0.10000000000000001',
        "m{} 3",
        "",
    ]
