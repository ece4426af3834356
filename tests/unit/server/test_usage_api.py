"""OpenAI's usage of completions, read by OpenAI's own client: what the ledger bills, in buckets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import sqlalchemy as sa

from lorabatch import Job, Ledger, Settings
from lorabatch.keys import Keys
from lorabatch.tables import usage_events
from lorabatch_producer.server import create_app
from lorabatch_producer.usage_buckets import edges
from tests.asking import asking
from tests.played_worker import fails, run_queued, succeeds

DAY_S = 86_400
MONDAY_S = 20_000 * DAY_S
# job, seconds after MONDAY_S at which it ends, fields
ENDED: list[tuple[str, int, dict[str, Any]]] = [
    ("a", 0, {"adapter_id": "sql"}),
    ("b", 3599, {"adapter_id": "sql", "batch_id": "x"}),
    ("c", 3600, {}),
    ("bad", 3600, {"adapter_id": "broken"}),
    ("d", DAY_S - 1, {"adapter_id": "xml"}),
    ("e", 2 * DAY_S, {"adapter_id": "sql"}),
    ("theirs", 0, {"adapter_id": "sql", "tenant": "beta"}),
]


@pytest.fixture
def filled(ledger: Ledger) -> Ledger:
    """Each job: 5 tokens in, 2 of them cached, and 3 out."""
    for job_id, at_s, fields in ENDED:
        job = {"job_id": job_id, "prompt": "hi", "tenant": "acme", **fields}
        ledger.accept([Job.parse(job)])
        run_queued(ledger, lambda c: fails(c) if c.job.adapter_id == "broken" else succeeds(c))
        with ledger.engine.begin() as connection:
            mine = sa.update(usage_events).where(usage_events.c.job_id == job_id)
            connection.execute(mine.values(occurred_us=(MONDAY_S + at_s) * 10**6))
    with ledger.engine.begin() as connection:
        base = sa.update(usage_events).where(usage_events.c.job_id == "c")
        connection.execute(base.values(base_model="/models/here/Tiny"))
    return ledger


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    headers = {"LoraBatch-Tenant": "acme"}
    with openai.OpenAI(
        base_url=f"{url}/v1", admin_api_key="none", default_headers=headers, max_retries=0
    ) as client:
        yield client


def used(client: openai.OpenAI, **asked: Any) -> list[list[tuple[Any, ...]]]:
    """For each bucket: model, batch, requests, input, cached and output of each result."""
    page = client.admin.organization.usage.completions(**{"start_time": MONDAY_S, **asked})
    return [
        [
            (
                *(r.model, r.batch, r.num_model_requests),
                *(r.input_tokens, r.input_cached_tokens, r.output_tokens),
            )
            for r in bucket.results
            if r.object == "organization.usage.completions.result"
        ]
        for bucket in page.data
    ]


def test_days(filled: Ledger, client: openai.OpenAI) -> None:
    end = MONDAY_S + 3 * DAY_S
    assert used(client, end_time=end) == [
        [(None, None, 4, 20, 8, 12)],
        [],
        [(None, None, 1, 5, 2, 3)],
    ]
    assert used(client, end_time=end, group_by=["model"])[0] == [
        ("Tiny", None, 1, 5, 2, 3),
        ("sql", None, 2, 10, 4, 6),
        ("xml", None, 1, 5, 2, 3),
    ]
    page = client.admin.organization.usage.completions(
        start_time=MONDAY_S, end_time=end, group_by=["project_id", "batch"]
    )
    first = page.data[0]
    assert (first.start_time, first.end_time) == (MONDAY_S, MONDAY_S + DAY_S)
    shown = [result.model_dump() for result in first.results]
    assert [(r["project_id"], r["batch"], r["num_model_requests"]) for r in shown] == [
        ("acme", False, 3),
        ("acme", True, 1),
    ]
    assert (page.object, page.has_more, page.next_page) == ("page", False, None)


def test_filters(filled: Ledger, client: openai.OpenAI) -> None:
    day = {"end_time": MONDAY_S + DAY_S}
    assert used(client, **day, models=["sql"]) == [[(None, None, 2, 10, 4, 6)]]
    assert used(client, **day, models=["Tiny", "xml"]) == [[(None, None, 2, 10, 4, 6)]]
    assert used(client, **day, models=["/models/here/Tiny"]) == [[]]
    assert used(client, **day, batch=True) == [[(None, None, 1, 5, 2, 3)]]
    assert used(client, **day, batch=False) == [[(None, None, 3, 15, 6, 9)]]
    assert used(client, **day, project_ids=["beta"]) == [[]]
    assert used(client, **day, project_ids=["beta", "acme"]) == used(client, **day)


def test_pages_of_hours_and_partial_buckets(filled: Ledger, client: openai.OpenAI) -> None:
    asked = {"start_time": MONDAY_S - 100, "end_time": MONDAY_S + 3700, "bucket_width": "1h"}
    usage = client.admin.organization.usage
    seen, page = [], usage.completions(**asked, limit=2)
    while True:
        seen += [
            (b.start_time - MONDAY_S, b.end_time - MONDAY_S, len(b.results)) for b in page.data
        ]
        if not page.has_more:
            break
        page = usage.completions(**asked, limit=2, page=page.next_page or "")
    assert seen == [(-100, 0, 0), (0, 3600, 1), (3600, 3700, 1)]
    minutes = used(client, bucket_width="1m", end_time=MONDAY_S + 3601, limit=61)
    assert [n for n, results in enumerate(minutes) if results] == [0, 59, 60]


def test_the_buckets_add_up_to_the_report(filled: Ledger, client: openai.OpenAI) -> None:
    hours = used(client, bucket_width="1h", end_time=MONDAY_S + 3 * DAY_S, limit=168)
    with filled.engine.begin() as connection:
        mine = sa.and_(usage_events.c.tenant == "acme", usage_events.c.billable)
        total = sa.func.sum(usage_events.c.input_tokens + usage_events.c.output_tokens)
        billed = connection.scalar(sa.select(total).where(mine))
    assert sum(one[3] + one[5] for results in hours for one in results) == billed == 40


REFUSED = [
    ("", "start_time"),
    ("start_time=x", "start_time"),
    ("start_time=1&end_time=1", "start_time"),
    ("start_time=1&bucket_width=1y", "bucket_width"),
    ("start_time=1&limit=32", "limit"),
    ("start_time=1&limit=0", "limit"),
    ("start_time=1&group_by=user_id", "group_by"),
    ("start_time=1&group_by[]=service_tier", "group_by"),
    ("start_time=1&user_ids[]=x", "user_ids"),
    ("start_time=1&api_key_ids=x", "api_key_ids"),
    ("start_time=1&page=x", "page"),
    ("start_time=99&page=page_1", "page"),
]


def test_what_is_not_supported_is_refused_by_name(http: httpx.Client) -> None:
    for query, named in REFUSED:
        answer = http.get(f"/v1/organization/usage/completions?{query}")
        assert answer.status_code == 400, query
        assert named in answer.json()["error"]["message"]


async def test_it_wants_a_key_for_usage(http_settings: Settings, ledger: Ledger) -> None:
    on = http_settings.model_copy(update={"http_keys": "on"})
    keys = Keys(ledger.engine)
    async with asking(create_app(on)) as http:
        said = []
        for scope in ("read", "usage"):
            me = {"Authorization": f"Bearer {keys.create('acme', scopes=[scope])[1]}"}
            path = "/v1/organization/usage/completions?start_time=1"
            said.append((await http.get(path, headers=me)).status_code)
    assert said == [403, 200]


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ((0, 30, 10, 9), [0, 10, 20, 30]),
        ((5, 25, 10, 9), [5, 10, 20, 25]),
        ((5, 9, 10, 9), [5, 9]),
        ((0, 100, 10, 2), [0, 10, 20]),
        ((5, 100, 10, 1), [5, 10]),
        ((0, 10, 10, 1), [0, 10]),
    ],
)
def test_edges(asked: tuple[int, int, int, int], wanted: list[int]) -> None:
    assert edges(*asked) == wanted
