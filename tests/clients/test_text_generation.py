"""text-generation."""

from __future__ import annotations

import pytest
from text_generation import AsyncClient, Client

from tests.clients.service import Service

# The client's own.
pytestmark = pytest.mark.filterwarnings("ignore:.*method is deprecated:DeprecationWarning")


@pytest.fixture
def headers(service: Service) -> dict[str, str]:
    return {"Authorization": f"Bearer {service.key}"}


def test_text_generation(service: Service, headers: dict[str, str]) -> None:
    client = Client(service.url, headers=headers)
    answer = client.generate("Once upon a time", max_new_tokens=8)
    assert len(answer.generated_text) > 8
    assert answer.details.generated_tokens == 8


def test_text_generation_stream(service: Service, headers: dict[str, str]) -> None:
    client = Client(service.url, headers=headers)
    events = list(client.generate_stream("Once upon a time", max_new_tokens=8))
    assert "".join(event.token.text for event in events if not event.token.special)
    assert events[-1].generated_text


def test_wrong_key(service: Service) -> None:
    with pytest.raises(Exception, match="key"):
        Client(service.url).generate("a")


async def test_async_text_generation(service: Service, headers: dict[str, str]) -> None:
    client = AsyncClient(service.url, headers=headers)
    answer = await client.generate("Once upon a time", max_new_tokens=8)
    assert answer.details.generated_tokens == 8
