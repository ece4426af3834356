"""What a text must be like, as OpenAI's, vLLM's and Hugging Face's clients say it, unmodified."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError
from pydantic import BaseModel

from lorabatch import Ledger, Settings
from lorabatch.ledger import Claim
from lorabatch.result import Result
from lorabatch.tables import jobs
from tests.openai_client import batch_of, ended, line, lines_in
from tests.played_worker import succeeds, working

pytestmark = pytest.mark.usefixtures("sql_adapter")
on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))  # "b" stays before "a", in any database
NAMED = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
ASKED: dict[str, Any] = {"model": "sql", "messages": [{"role": "user", "content": "Go"}]}


@pytest.fixture
def http_settings(http_settings: Settings) -> Settings:
    return http_settings.model_copy(update={"base_model": "acme/tiny", "http_wait_s": 20.0})


def answers(claim: Claim) -> Result:
    return succeeds(claim, text='{"b": 1, "a": "x"}')


def wanted(ledger: Ledger) -> list[Any]:
    """Of the jobs that were accepted, oldest first."""
    with ledger.engine.connect() as connection:
        rows = connection.execute(jobs.select().order_by(jobs.c.submitted_us))
        return [row.body["sampling_params"].get("structured_outputs") for row in rows]


class Answer(BaseModel):
    b: int
    a: str


def test_openais_client_parses_what_it_asked_for(client: openai.OpenAI, ledger: Ledger) -> None:
    with working(ledger, answers):
        client.chat.completions.create(**ASKED, response_format=NAMED)
        parsed = client.chat.completions.parse(**ASKED, response_format=Answer)
        client.chat.completions.create(**ASKED, response_format={"type": "json_object"})
        client.chat.completions.create(**ASKED, response_format={"type": "text"})
    assert parsed.choices[0].message.parsed == Answer(b=1, a="x")
    first, second, third, fourth = wanted(ledger)
    assert first == {"json": TEXT}
    assert list(json.loads(second["json"])["properties"]) == ["b", "a"]
    assert (third, fourth) == ({"json_object": True}, None)


@on_sqlite
def test_vllms_field_is_ours(client: openai.OpenAI, ledger: Ledger) -> None:
    kinds: list[dict[str, Any]] = [
        {"json": SCHEMA},
        {"regex": "a+"},
        {"choice": ["yes", "no"]},
        {"json_object": True},
    ]
    with working(ledger, answers):
        for kind in kinds:
            client.chat.completions.create(**ASKED, extra_body={"structured_outputs": kind})
        client.completions.create(
            model="sql", prompt="Go", extra_body={"structured_outputs": kinds[1]}
        )
    assert wanted(ledger) == [{"json": TEXT}, *kinds[1:], kinds[1]]


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
    ),
    (
        {"response_format": NAMED, "structured_outputs": {"regex": "a"}},
        "response_format: not with structured_outputs",
    ),
    ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"json": {"enum": ["x" * 300_000]}}}, "structured_outputs.json"),
    ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    ({"guided_json": SCHEMA}, "guided_json"),
)


@on_sqlite
def test_others_are_refused_by_name(client: openai.OpenAI, ledger: Ledger) -> None:
    for more, name in REFUSED:
        with pytest.raises(openai.BadRequestError, match=name.replace(".", r"\.")):
            client.chat.completions.create(**ASKED, extra_body=more)
    assert wanted(ledger) == []


@on_sqlite
def test_hugging_faces_client_says_it_both_ways(url: str, ledger: Ledger) -> None:
    client = InferenceClient(model=url, token="none")
    grammars: list[Any] = [
        {"type": "json", "value": SCHEMA},
        {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}},
        {"type": "regex", "value": "a+"},
    ]
    with working(ledger, answers):
        for grammar in grammars:
            client.text_generation("Go", adapter_id="sql", grammar=grammar)
        form: Any = NAMED
        InferenceClient(base_url=url, api_key="none").chat.completions.create(
            **ASKED, response_format=form
        )
    assert wanted(ledger) == [{"json": TEXT}, {"json": TEXT}, {"regex": "a+"}, {"json": TEXT}]
    refused: Any = {"type": "lark", "value": "start: x"}
    with pytest.raises(ValidationError, match="grammar: wanted a type"):
        client.text_generation("Go", grammar=refused)


@on_sqlite
def test_lines_of_batches_have_it_too(client: openai.OpenAI, ledger: Ledger) -> None:
    with working(ledger, answers):
        made = batch_of(client, [line(1, body={**ASKED, "response_format": NAMED})])
        done = ended(client, made)
    (answered,) = lines_in(client, done.output_file_id)
    message = answered["response"]["body"]["choices"][0]["message"]
    assert json.loads(message["content"]) == {"b": 1, "a": "x"}
    assert wanted(ledger) == [{"json": TEXT}]
