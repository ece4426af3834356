"""TGI's routes with Hugging Face's own client, unmodified."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import GenerationError, HfHubHTTPError, OverloadedError, ValidationError

from lorabatch import ErrorInfo, Ledger, Result, Settings
from lorabatch.ledger import Claim
from lorabatch.tables import jobs
from lorabatch.tenants import Limits, Tenants
from tests.played_worker import fails, working

pytestmark = [
    pytest.mark.parametrize("database", ["sqlite"], indirect=True),
    pytest.mark.usefixtures("sql_adapter"),
]


@pytest.fixture
def http_settings(http_settings: Settings) -> Settings:
    folder = http_settings.home / "adapters" / "dropped-in"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    adapters = Settings.load(adapters="configured=acme/lora").adapters
    return http_settings.model_copy(
        update={"base_model": "/models/tiny", "adapters": adapters, "http_wait_s": 20.0}
    )


@pytest.fixture
def client(url: str) -> InferenceClient:
    return InferenceClient(model=url, token="none")


def sampling(ledger: Ledger) -> list[dict[str, Any]]:
    """What jobs were accepted with, oldest first."""
    with ledger.engine.connect() as connection:
        rows = connection.execute(jobs.select().order_by(jobs.c.submitted_us))
        return [row.body["sampling_params"] for row in rows]


def test_text_is_generated_with_an_adapter(client: InferenceClient, ledger: Ledger) -> None:
    with working(ledger):
        assert client.text_generation("How many?", adapter_id="sql") == "sql: How many?"
        assert client.text_generation("How many?") == "None: How many?"
        assert client.text_generation("Go", adapter_id="configured") == "configured: Go"
        assert client.text_generation("Go", adapter_id="dropped-in") == "dropped-in: Go"
        full = client.text_generation("Go", adapter_id="sql", return_full_text=True)
        assert full == "Gosql: Go"


def test_details_are_told(client: InferenceClient, ledger: Ledger) -> None:
    with working(ledger):
        answer = client.text_generation("Go", adapter_id="sql", details=True, seed=7)
    assert answer.generated_text == "sql: Go"
    details = answer.details
    assert details is not None
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("eos_token", 3, 7)
    assert (details.prefill, details.tokens) == ([], [])


def test_it_is_greedy_unless_something_asks_for_sampling(
    client: InferenceClient, ledger: Ledger
) -> None:
    greedy = {"max_new_tokens": 100, "temperature": 0.0}
    sampled = {"max_new_tokens": 100, "temperature": 1.0}
    wanted: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, greedy),
        ({"do_sample": False, "seed": 3}, {**greedy, "seed": 3}),
        ({"temperature": 1.0, "top_p": 1.0}, {**greedy, "top_p": 1.0}),
        ({"do_sample": True}, sampled),
        ({"temperature": 0.5}, {**sampled, "temperature": 0.5}),
        ({"top_k": 5}, {**sampled, "top_k": 5}),
        ({"top_p": 0.5}, {**sampled, "top_p": 0.5}),
        ({"max_new_tokens": 8, "stop": ["x"]}, {**greedy, "max_new_tokens": 8, "stop": ["x"]}),
        (
            {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "best_of": 1, "typical_p": 1.0},
            {**greedy, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
        ),
    ]
    with working(ledger):
        for given, _ in wanted:
            client.text_generation("Go", **given)
    assert sampling(ledger) == [params for _, params in wanted]


def test_what_is_not_supported_is_refused_by_name(client: InferenceClient, ledger: Ledger) -> None:
    refused: dict[str, Any] = {
        "best_of": 2,
        "top_n_tokens": 3,
        "watermark": True,
        "typical_p": 1.5,
        "truncate": 10,
        "grammar": {"type": "lark", "value": "start: x"},
        "top_p": 2.0,
        "max_new_tokens": 0,
        "adapter_id": "nobody",
    }
    for name, value in refused.items():
        with pytest.raises(ValidationError, match=f"^{name}: "):
            client.text_generation("Go", **{name: value})
    assert sampling(ledger) == []


@pytest.mark.parametrize("path", ["/", "/generate"])
def test_both_paths_refuse_what_is_no_request(
    http: httpx.Client, ledger: Ledger, path: str
) -> None:
    bodies: list[tuple[dict[str, Any], str]] = [
        ({}, "inputs: wanted one text"),
        ({"inputs": ["a"]}, "inputs: wanted one text"),
        ({"inputs": ""}, "prompt is empty"),
        ({"inputs": ""}, "inputs: "),
        ({"inputs": "a\0"}, "inputs: must not contain the NUL character"),
        ({"inputs": "a", "parameters": [1]}, "parameters: must be an object"),
        ({"inputs": "a", "colour": 1}, "colour: not supported"),
        ({"inputs": "a", "parameters": {"colour": 1}}, "colour: not supported"),
        ({"inputs": "a", "parameters": {"decoder_input_details": True}}, "decoder_input_details: "),
        ({"inputs": "a", "parameters": {"do_sample": 1}}, "do_sample: wanted true or false"),
        ({"inputs": "a", "parameters": {"adapter_id": ["sql"]}}, "adapter_id: wanted"),
    ]
    for body, word in bodies:
        answer = http.post(path, json=body)
        assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
        assert word in answer.json()["error"]
    assert sampling(ledger) == []


def test_a_failed_job_is_a_generation_error(client: InferenceClient, ledger: Ledger) -> None:
    def broken(claim: Claim) -> Result:
        error = ErrorInfo(code="engine_fault", message="this is why")
        return fails(claim).model_copy(update={"error": error})

    with working(ledger, broken), pytest.raises(GenerationError, match="this is why"):
        client.text_generation("Go")


def test_a_full_queue_is_overload(client: InferenceClient, ledger: Ledger) -> None:
    Tenants(ledger.engine).set(Limits(tenant="default", max_queued=0))
    with pytest.raises(OverloadedError):
        client.text_generation("Go")


def test_its_chats_go_to_openais_route(url: str, ledger: Ledger) -> None:
    with working(ledger):
        answer = InferenceClient(base_url=url).chat_completion(
            [{"role": "user", "content": "Hello"}], model="sql", max_tokens=5
        )
    assert answer.choices[0].message.content == "sql: Hello"
    assert (answer.model, answer.usage.total_tokens) == ("sql", 8)
    # Without a model that client names one that is not there; it is not the base model's answer.
    with pytest.raises(HfHubHTTPError, match="404"):
        InferenceClient(base_url=url).chat_completion([{"role": "user", "content": "Hello"}])


def test_it_says_what_and_how_it_is(url: str, http: httpx.Client) -> None:
    client = InferenceClient(model=url, provider="hf-inference", token="none")
    info = client.get_endpoint_info()
    assert (info["model_id"], info["router"]) == ("tiny", "lorabatch")
    assert client.health_check()
    for path in ("/info", "/v1/models"):
        assert "/models" not in http.get(path).text  # the folder is nobody's business
