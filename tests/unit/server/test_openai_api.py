"""OpenAI's routes with OpenAI's own clients, unmodified."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from lorabatch import ErrorInfo, Ledger, Result, Settings
from lorabatch.ledger import Claim
from lorabatch.queues import Queues
from lorabatch.registry import SHARED, Registered, Registry
from lorabatch.tables import jobs
from lorabatch.tenants import Limits, Tenants
from tests.played_worker import succeeds, working

on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How many users?"}]


@pytest.fixture
def http_settings(http_settings: Settings) -> Settings:
    return http_settings.model_copy(update={"base_model": "acme/tiny@main", "http_wait_s": 20.0})


@pytest.fixture(autouse=True)
def _adapters(ledger: Ledger) -> None:
    """`sql` for all, `secret` for one."""
    for tenant, name in ((SHARED, "sql"), ("acme", "secret")):
        where = f"/adapters/{name}"
        Registry(ledger.engine).add(Registered(tenant, name, "1" * 64, where, None, 8, 1, 0))


@pytest.fixture
def acme(client: openai.OpenAI) -> openai.OpenAI:
    return client.with_options(default_headers={"LoraBatch-Tenant": "acme"})


def rows(ledger: Ledger) -> list[Any]:
    with ledger.engine.connect() as connection:
        return list(connection.execute(jobs.select()))


def told(error: openai.APIStatusError) -> tuple[str | None, str | None, str | None]:
    return error.type, error.param, error.code


def test_a_chat_is_answered(client: openai.OpenAI, ledger: Ledger) -> None:
    with working(ledger):
        answer = client.chat.completions.create(
            model="sql", messages=MESSAGES, max_completion_tokens=7, seed=3, user="somebody"
        )
    (row,) = rows(ledger)
    assert (row.adapter_id, row.tenant, row.state) == ("sql", "default", "succeeded")
    assert row.body["sampling_params"] == {"temperature": 1.0, "seed": 3, "max_new_tokens": 7}
    assert (answer.id, answer.object) == (f"chatcmpl-{row.job_id}", "chat.completion")
    assert answer.model == "sql"
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    assert choice.message.content == "sql: How many users?"
    usage = answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 3, 8)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 2
    ended = ledger.results([row.job_id])[row.job_id]
    assert answer.created == (ended.finished_us or 0) // 1_000_000 > 0


@on_sqlite
def test_the_fingerprint_is_the_models(client: openai.OpenAI, ledger: Ledger) -> None:
    with working(ledger):
        found = [
            client.completions.create(model=model, prompt="a").system_fingerprint
            for model in ("sql", "sql", "acme/tiny")
        ]
    assert found[0] == found[1] != found[2]
    assert all(found)


@on_sqlite
async def test_an_async_client_completes_a_prompt(url: str, ledger: Ledger) -> None:
    def cut(claim: Claim) -> Result:
        return succeeds(claim, finish_reason="length")

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with working(ledger, cut):
            answer = await client.completions.create(model="acme/tiny", prompt="Once", stop=["x"])
            known = [model.id async for model in await client.models.list()]
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("None: Once", "length")
    (row,) = rows(ledger)
    assert row.adapter_id is None
    assert row.body["sampling_params"] == {"temperature": 1.0, "max_new_tokens": 16, "stop": ["x"]}
    assert known == ["acme/tiny", "sql"]


def test_a_list_of_one_prompt_is_one_prompt(client: openai.OpenAI, ledger: Ledger) -> None:
    """As LangChain sends it, and many others."""
    with working(ledger):
        answer = client.completions.create(model="sql", prompt=["Once"])
    assert answer.choices[0].text == "sql: Once"
    for prompts in (["a", "b"], [["a"]], []):
        with pytest.raises(openai.BadRequestError, match="prompt: wanted one text"):
            client.completions.create(model="sql", prompt=prompts)  # type: ignore[arg-type]


def test_a_tenant_sees_its_own_models(client: openai.OpenAI, acme: openai.OpenAI) -> None:
    assert [(m.id, m.owned_by) for m in acme.models.list()] == [
        ("acme/tiny", "lorabatch"),
        ("secret", "acme"),
        ("sql", "lorabatch"),
    ]
    assert acme.models.retrieve("secret").id == "secret"
    assert client.models.retrieve("acme/tiny").id == "acme/tiny"
    answers = []
    for name in ("secret", "nobody"):
        with pytest.raises(openai.NotFoundError) as error:
            client.models.retrieve(name)
        answers.append(str(error.value).replace(name, "?"))
    assert answers[0] == answers[1]


def test_an_unknown_model_is_refused(client: openai.OpenAI, ledger: Ledger) -> None:
    for name in ("secret", "dummy", "../x", "a\x00b", "", "x" * 200):
        with pytest.raises(openai.NotFoundError) as error:
            client.chat.completions.create(model=name, messages=MESSAGES)
        assert told(error.value) == ("invalid_request_error", "model", "model_not_found")
    assert rows(ledger) == []


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 17}, "n"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"extra_body": {"functions": [{"name": "f"}]}}, "functions"),
    ({"temperature": 11}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"service_tier": "scale"}, "service_tier"),
    ({"service_tier": "flex", "extra_body": {"priority": 1}}, "service_tier"),
    ({"extra_body": {"colour": "red"}}, "colour"),
    ({"extra_body": {"messages": []}}, "messages"),
    (
        {"extra_body": {"chat_template": "{% for i in range(10**9) %}x{% endfor %}"}},
        "chat_template",
    ),
    ({"max_completion_tokens": 10**9}, "max_completion_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    ({"extra_body": {"max_tokens": "7"}}, "max_tokens"),
    ({"extra_body": {"messages": [{"role": "user", "content": "a\0"}]}}, "messages.0.content"),
]


@on_sqlite
def test_what_is_not_supported_is_refused_by_name(client: openai.OpenAI, ledger: Ledger) -> None:
    for fields, param in REFUSED:
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(model="sql", messages=MESSAGES, **fields)
        assert told(error.value)[:2] == ("invalid_request_error", param)
        assert error.value.body["message"].startswith(f"{param}: ")  # type: ignore[index]
    assert rows(ledger) == []


@on_sqlite
def test_a_service_tier_is_a_priority(client: openai.OpenAI, ledger: Ledger) -> None:
    with working(ledger):
        for tier in ("flex", "default", "priority"):
            client.chat.completions.create(
                model="sql",
                messages=MESSAGES,
                service_tier=tier,
            )
    assert sorted(row.priority for row in rows(ledger)) == [-10, 0, 10]


# A job's own error is not for the client to repeat, and it does not, though it may.
FAILED: list[tuple[str, type[openai.APIStatusError], str, int]] = [
    ("unknown_adapter", openai.NotFoundError, "model_not_found", 2),
    ("prompt_too_long", openai.BadRequestError, "context_length_exceeded", 2),
    ("engine_fault", openai.InternalServerError, "engine_fault", 2),
    ("attempts_exhausted", openai.InternalServerError, "attempts_exhausted", 2),
    ("adapter_unavailable", openai.InternalServerError, "adapter_unavailable", 0),
    ("something_new", openai.InternalServerError, "job_failed", 0),
]


@on_sqlite
def test_a_failed_job_is_the_error_of_its_code(client: openai.OpenAI, ledger: Ledger) -> None:
    def fails(claim: Claim) -> Result:
        error = ErrorInfo(code=claim.job.prompt or "", message="this is why")
        return succeeds(claim, state="failed", text=None, finish_reason=None, error=error)

    with working(ledger, fails):
        for code, kind, told_code, retries in FAILED:
            with pytest.raises(kind) as error:
                client.with_options(max_retries=retries).completions.create(
                    model="sql", prompt=code
                )
            assert error.value.code == told_code
            assert "this is why" in str(error.value)
    assert len(rows(ledger)) == len(FAILED)


@on_sqlite
def test_a_cancelled_job_is_an_error(client: openai.OpenAI, ledger: Ledger) -> None:
    def cancelled(claim: Claim) -> Result:
        return succeeds(claim, state="cancelled", text=None, finish_reason=None)

    with working(ledger, cancelled), pytest.raises(openai.APIStatusError) as error:
        client.with_options(max_retries=1).completions.create(model="sql", prompt="a")
    assert (error.value.status_code, error.value.code) == (410, "job_cancelled")
    assert len(rows(ledger)) == 1


@on_sqlite
def test_a_full_queue_is_a_rate_limit(client: openai.OpenAI, ledger: Ledger) -> None:
    Tenants(ledger.engine).set(Limits(tenant="default", max_queued=0))
    with pytest.raises(openai.RateLimitError) as error:
        client.completions.create(model="sql", prompt="a")
    assert error.value.code == "rate_limit_exceeded"
    assert int(error.value.response.headers["retry-after"]) > 0


@on_sqlite
def test_a_key_answers_again_with_the_same(client: openai.OpenAI, ledger: Ledger) -> None:
    key = {"Idempotency-Key": "order 7"}
    with working(ledger):
        answers = [
            client.chat.completions.create(model="sql", messages=MESSAGES, extra_headers=key)
            for _ in range(2)
        ]
        with pytest.raises(openai.ConflictError) as error:
            client.completions.create(model="sql", prompt="Another", extra_headers=key)
    assert answers[0] == answers[1]
    assert error.value.code == "idempotency_conflict"
    assert len(rows(ledger)) == 1


@on_sqlite
def test_a_base_models_name_picks_its_queue(client: openai.OpenAI, ledger: Ledger) -> None:
    Queues(ledger.engine).set("second", "acme/other")
    registry = Registry(ledger.engine)
    registry.add(Registered(SHARED, "for-other", "2" * 64, "/x", "acme/other", 8, 1, 0))
    wanted = {"acme/tiny": "lorabatch", "acme/other": "second", "other": "second"}
    wanted |= {"for-other": "second", "sql": "lorabatch"}
    with working(ledger):
        for name in wanted:
            client.completions.create(model=name, prompt=name)
    assert {row.body["prompt"]: row.queue for row in rows(ledger)} == wanted
    parents = {model.id: model.to_dict()["parent"] for model in client.models.list()}
    assert parents == {
        "acme/tiny": None,
        "acme/other": None,
        "for-other": "acme/other",
        "sql": "acme/tiny",
    }
