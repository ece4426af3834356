"""What is counted in a minute: by several servers at once, anew in the next one, and what a job may
take."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from lorabatch import Job, rates
from lorabatch.database import connect
from lorabatch.http_tables import tenant_minutes
from lorabatch.rates import Minute, Rate, Rates, estimated_tokens, rate_of
from lorabatch.tenants import EACH, Limits, Tenants


@pytest.fixture(autouse=True)
def _one_long_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MINUTE_US", 10**16)


def counted(database: sa.Engine) -> list[tuple[str, int, int]]:
    columns = tenant_minutes.c.tenant, tenant_minutes.c.requests, tenant_minutes.c.tokens
    with database.connect() as connection:
        return [(row[0], row[1], row[2]) for row in connection.execute(sa.select(*columns))]


def test_what_is_beyond_a_limit_is_not_counted(database: sa.Engine) -> None:
    known = Rates(database)
    rate = Rate(requests=3, tokens=100)
    granted = [known.take("acme", rate, tokens).granted for tokens in (60, 50, 40, 0, 0)]
    assert granted == [True, False, True, True, False]
    assert counted(database) == [("acme", 3, 100)]
    assert known.take("other", rate, 100).granted


def test_a_new_minute_begins_at_nothing(database: sa.Engine) -> None:
    known = Rates(database)
    assert known.take("acme", Rate(1), 5).granted
    assert not known.take("acme", Rate(1), 5).granted
    with database.begin() as connection:
        connection.execute(sa.update(tenant_minutes).values(minute=tenant_minutes.c.minute - 1))
    again = known.take("acme", Rate(1), 7)
    assert (again.granted, again.requests, again.tokens) == (True, 1, 7)
    assert 0 < again.left_s <= 1e10


def test_several_servers_give_no_place_away_twice(database: sa.Engine) -> None:
    url = database.url.render_as_string(hide_password=False)
    engines = [connect(url) for _ in range(4)]

    def take(number: int) -> bool:
        return Rates(engines[number % 4]).take("acme", Rate(requests=10), 1).granted

    with ThreadPoolExecutor(8) as threads:
        granted = sum(threads.map(take, range(40)))
    for engine in engines:
        engine.dispose()
    assert (granted, counted(database)) == (10, [("acme", 10, 10)])


def test_each_limit_is_a_tenants_own_or_that_of_each(database: sa.Engine) -> None:
    tenants = Tenants(database)
    tenants.set(Limits(EACH, tokens_per_minute=50))
    tenants.set(Limits("acme", requests_per_minute=0))
    tenants.set(Limits("heavy", 2.0, 3, 4))
    limits = Rates(database).limits()
    assert limits == {EACH: Rate(None, 50), "acme": Rate(0, None)}
    assert rate_of("acme", limits) == Rate(0, 50)
    assert rate_of("heavy", limits) == rate_of("new", limits) == Rate(None, 50)
    assert rate_of("new", {}) == Rate()


def test_what_a_job_may_take() -> None:
    assert estimated_tokens(Job.parse({"prompt": "x" * 9})) == 256 + 3
    messages = [{"role": "system", "content": "abcd"}, {"role": "user", "content": "abcd"}]
    job = Job.parse({"messages": messages, "sampling_params": {"max_new_tokens": 7}})
    assert estimated_tokens(job) == 7 + 2
    function = {"name": "f", "parameters": {"title": "x" * 400}}
    call = {"id": "1", "function": {"name": "f", "arguments": "y" * 400}}
    messages += [{"role": "assistant", "tool_calls": [call]}]
    tools = [{"type": "function", "function": function}]
    job = Job.parse({"messages": messages, "tools": tools})
    assert estimated_tokens(job) > 256 + 200


@pytest.mark.parametrize(
    ("rate", "requests", "tokens", "asked", "said"),
    [
        (Rate(60), 60, 0, 9, "60 requests a minute, 60 came in this one: come again in 12 s"),
        (Rate(0), 0, 0, 9, "0 requests a minute, 0 came in this one: it will never fit"),
        (Rate(60, 1000), 3, 900, 300, "900 are taken in this one, and this may take 300: come"),
        (Rate(None, 1000), 3, 0, 1001, "this may take 1,001: it will never fit"),
    ],
)
def test_a_refusal_says_what_and_when(
    rate: Rate, requests: int, tokens: int, asked: int, said: str
) -> None:
    error = Minute("acme", rate, asked, False, requests, tokens, 11.6).refusal()
    assert said in str(error)
    assert "`lorabatch tenants set acme --" in str(error)
