"""lorax-client."""

from __future__ import annotations

import json

import pytest
from lorax import AsyncClient, Client, MergedAdapters
from lorax.errors import ValidationError

from tests.clients.service import Service

PROMPT = "<|im_start|>user\nHow many books are there?<|im_end|>\n<|im_start|>assistant\n"

# The client's own.
pytestmark = pytest.mark.filterwarnings("ignore:.*method is deprecated:DeprecationWarning")


@pytest.fixture
def headers(service: Service) -> dict[str, str]:
    return {"Authorization": f"Bearer {service.key}"}


@pytest.fixture
def client(service: Service, headers: dict[str, str]) -> Client:
    return Client(service.url, headers=headers)


def test_text_generation(client: Client) -> None:
    answer = client.generate(PROMPT, adapter_id="sql", max_new_tokens=24)
    assert "SELECT" in answer.generated_text
    assert answer.details.generated_tokens <= 24
    assert answer.details.prompt_tokens > 8


def test_text_generation_stream(client: Client) -> None:
    events = list(client.generate_stream(PROMPT, adapter_id="sql", max_new_tokens=24))
    assert "SELECT" in "".join(event.token.text for event in events)
    assert "SELECT" in events[-1].generated_text


def test_merged_adapters(client: Client) -> None:
    merged = MergedAdapters(ids=["sql", "json"], weights=[1.0, 0.0], density=0.5)
    answer = client.generate(PROMPT, merged_adapters=merged, max_new_tokens=24)
    assert "SELECT" in answer.generated_text


async def test_async_text_generation(service: Service, headers: dict[str, str]) -> None:
    client = AsyncClient(service.url, headers=headers)
    answer = await client.generate(PROMPT, adapter_id="sql", max_new_tokens=24)
    assert "SELECT" in answer.generated_text


def test_unknown_adapter(client: Client) -> None:
    with pytest.raises(ValidationError, match="nobody"):
        client.generate(PROMPT, adapter_id="nobody")


def test_structured_output(client: Client) -> None:
    schema = {
        "type": "object",
        "properties": {"books": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["books"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_object", "schema": schema}
    answer = client.generate(PROMPT, adapter_id="sql", max_new_tokens=24, response_format=wanted)
    assert 0 <= json.loads(answer.generated_text)["books"] <= 9
