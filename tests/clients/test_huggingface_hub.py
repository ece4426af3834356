"""huggingface_hub."""

from __future__ import annotations

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import TextGenerationError, ValidationError

from tests.clients.service import Service

MESSAGES = [{"role": "user", "content": "How many books are there?"}]
PROMPT = "<|im_start|>user\nHow many books are there?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def client(service: Service) -> InferenceClient:
    return InferenceClient(model=service.url, token=service.key)


def test_text_generation(client: InferenceClient) -> None:
    text = client.text_generation(PROMPT, adapter_id="sql", max_new_tokens=24)
    assert "SELECT" in text


def test_text_generation_stream(client: InferenceClient) -> None:
    pieces = client.text_generation(PROMPT, adapter_id="sql", max_new_tokens=24, stream=True)
    assert "SELECT" in "".join(pieces)


def test_details_stream(client: InferenceClient) -> None:
    stream = client.text_generation(
        PROMPT, adapter_id="sql", max_new_tokens=4, details=True, stream=True
    )
    events = [event for event in stream if event.token.id >= 0]
    whole = client.text_generation(PROMPT, adapter_id="sql", max_new_tokens=4, details=True)
    assert whole.details is not None
    wanted = [(token.id, token.logprob) for token in whole.details.tokens]
    assert [(event.token.id, event.token.logprob) for event in events] == wanted


def test_details(client: InferenceClient) -> None:
    answer = client.text_generation(PROMPT, adapter_id="sql", max_new_tokens=4, details=True)
    assert answer.details is not None
    assert (answer.details.finish_reason, answer.details.generated_tokens) == ("length", 4)


def test_chat(client: InferenceClient) -> None:
    answer = client.chat_completion(
        MESSAGES, model=None, max_tokens=24, extra_body={"model": "sql"}
    )
    assert "SELECT" in (answer.choices[0].message.content or "")


def test_chat_stream(service: Service) -> None:
    client = InferenceClient(base_url=service.openai_url, api_key=service.key)
    chunks = client.chat.completions.create(MESSAGES, model="sql", max_tokens=24, stream=True)
    assert "SELECT" in "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_tools(client: InferenceClient) -> None:
    schema = {"type": "object", "properties": {"town": {"enum": ["Bern"]}}, "required": ["town"]}
    answer = client.chat_completion(
        MESSAGES,
        max_tokens=64,
        tools=[{"type": "function", "function": {"name": "weather", "parameters": schema}}],
        tool_choice={"function": {"name": "weather"}},
        extra_body={"model": "caller"},
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.function.name == "weather"


def test_structured_output(client: InferenceClient) -> None:
    grammar = {"type": "regex", "value": "(yes|no)"}
    text = client.text_generation(PROMPT, adapter_id="sql", max_new_tokens=8, grammar=grammar)
    assert text in ("yes", "no")


def test_unknown_adapter(client: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="nobody"):
        client.text_generation(PROMPT, adapter_id="nobody")


def test_wrong_key(service: Service) -> None:
    with pytest.raises(TextGenerationError, match="wanted a key"):
        InferenceClient(model=service.url, token="lb-nobody").text_generation("a")
