"""Several texts and log probabilities with OpenAI's and Hugging Face's own clients."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError
from openai.types.chat import ChatCompletionMessageParam

from lorabatch import Ledger, Settings
from lorabatch.candidates import seed_of
from lorabatch.queue import resolve_broker
from lorabatch.result import Token
from lorabatch.streams import Piece
from lorabatch.tables import jobs
from lorabatch_producer.audit import audit
from lorabatch_worker.text_sender import TextSender
from tests.faults.waiting import until
from tests.played_worker import working
from tests.told_choices import told

on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How many users?"}]


@pytest.fixture
def http_settings(http_settings: Settings) -> Settings:
    return http_settings.model_copy(update={"base_model": "acme/tiny", "http_wait_s": 20.0})


@pytest.fixture
def tgi(url: str) -> InferenceClient:
    return InferenceClient(model=url, token="none")


def sampling(ledger: Ledger) -> list[dict[str, Any]]:
    with ledger.engine.connect() as connection:
        rows = connection.execute(jobs.select().order_by(jobs.c.submitted_us))
        return [row.body["sampling_params"] for row in rows]


def test_a_chat_has_several_choices_with_log_probabilities(
    client: openai.OpenAI, ledger: Ledger
) -> None:
    with working(ledger, told):
        answer = client.chat.completions.create(
            model="acme/tiny",
            messages=MESSAGES,
            n=3,
            logprobs=True,
            top_logprobs=2,
            logit_bias={"17": -100},
            max_tokens=9,
        )
    assert sampling(ledger) == [
        {"n": 3, "logprobs": True, "top_logprobs": 2, "logit_bias": {"17": -100.0}}
        | {"temperature": 1.0, "max_new_tokens": 9}
    ]
    assert [(c.index, c.message.content, c.finish_reason) for c in answer.choices] == [
        *((0, "é 0", "stop"), (1, "é 1", "length"), (2, "é 2", "length"))
    ]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 12)
    told_of = answer.choices[1].logprobs
    assert told_of is not None
    assert told_of.content is not None
    assert [token.logprob for token in told_of.content] == [-1.75, -1.75, -1.75, -0.25]
    raw = b"".join(bytes(token.bytes or ()) for token in told_of.content)
    assert raw.decode() == "é 1<end>"
    assert [(t.token, t.logprob) for t in told_of.content[2].top_logprobs] == [
        (" 1", -0.5),
        (" 2", -1.0),
    ]
    assert audit(ledger.engine) == []


def test_what_asks_for_nothing_is_the_same_request_as_before(
    client: openai.OpenAI, ledger: Ledger
) -> None:
    nothing: dict[str, Any] = {"n": 1, "logprobs": False, "top_logprobs": 0, "logit_bias": {}}
    with working(ledger):
        answer = client.chat.completions.create(model="acme/tiny", messages=MESSAGES, **nothing)
        client.completions.create(model="acme/tiny", prompt="a", best_of=1, n=1)
    assert sampling(ledger) == [{"temperature": 1.0}, {"temperature": 1.0, "max_new_tokens": 16}]
    assert answer.choices[0].logprobs is None


def test_a_completion_is_the_best_of_several(client: openai.OpenAI, ledger: Ledger) -> None:
    with working(ledger, told):
        answer = client.completions.create(
            model="acme/tiny", prompt="a", n=2, best_of=4, logprobs=1
        )
        single = client.completions.create(model="acme/tiny", prompt="a", best_of=3, logprobs=0)
    first = {"n": 2, "best_of": 4, "logprobs": True, "top_logprobs": 1}
    second = {"best_of": 3, "logprobs": True, "top_logprobs": 0}
    ours = {"temperature": 1.0, "max_new_tokens": 16}
    assert sampling(ledger) == [{**first, **ours}, {**second, **ours}]
    assert [choice.text for choice in answer.choices] == ["é 0", "é 1"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2 * 4 + 2 * 2
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens == ["\ufffd", "\ufffd", " 0", "<end>"]
    assert found.token_logprobs == [-2.0, -2.0, -2.0, -0.25]
    assert found.text_offset == [0, 0, 1, 3]
    assert found.top_logprobs is not None
    assert found.top_logprobs[2] == {" 1": -0.5, " 0": -2.0}
    (choice,) = single.choices
    assert choice.logprobs is not None
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.top_logprobs[2] == {" 0": -2.0}
    assert audit(ledger.engine) == []


REFUSED: list[tuple[bool, dict[str, Any], str]] = [
    (True, {"n": 0}, "n"),
    (True, {"n": 2, "temperature": 0}, "temperature"),
    (True, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (True, {"logit_bias": {"5": 101}}, "logit_bias.5"),
    (True, {"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
    (True, {"extra_body": {"best_of": 2}}, "best_of"),
    (True, {"n": 2, "stream": True}, "n"),
    (False, {"n": 3, "best_of": 2}, "best_of"),
    (False, {"logprobs": 21}, "logprobs"),
    (False, {"extra_body": {"logprobs": True}}, "logprobs"),
    (False, {"best_of": 2, "stream": True}, "best_of"),
    (False, {"echo": True}, "echo"),
]


@on_sqlite
def test_what_cannot_be_had_is_refused_by_name(client: openai.OpenAI, ledger: Ledger) -> None:
    for chat, fields, param in REFUSED:
        what: dict[str, Any] = {"messages": MESSAGES} if chat else {"prompt": "a"}
        create: Any = client.chat.completions.create if chat else client.completions.create
        with pytest.raises(openai.BadRequestError) as error:
            create(model="acme/tiny", **what, **fields)
        assert error.value.body["message"].startswith(f"{param}"), fields  # type: ignore[index]
    assert sampling(ledger) == []


@on_sqlite
def test_tgis_details_tell_tokens(tgi: InferenceClient, ledger: Ledger) -> None:
    with working(ledger, told):
        answer = tgi.text_generation("Go", details=True, top_n_tokens=2, typical_p=0.9)
        plain = tgi.text_generation("Go")
    params = {"logprobs": True, "top_logprobs": 2, "typical_p": 0.9, "temperature": 1.0}
    assert sampling(ledger)[0] == {**params, "max_new_tokens": 100}
    assert answer.generated_text == plain == "é 0"
    details = answer.details
    assert details is not None
    assert [(t.id, t.text, t.logprob, t.special) for t in details.tokens] == [
        (1, "\ufffd", -2.0, False),
        (2, "\ufffd", -2.0, False),
        (3, " 0", -2.0, False),
        (0, "<end>", -0.25, True),
    ]
    assert details.top_tokens is not None
    top: list[Any] = details.top_tokens[2]  # which that client leaves as they come
    assert [(t["id"], t["text"]) for t in top] == [(4, " 1"), (5, " 2")]
    assert details.best_of_sequences is None


@on_sqlite
def test_a_stream_has_each_tokens_log_probability(
    client: openai.OpenAI, ledger: Ledger, http_settings: Settings
) -> None:
    """Of the first piece as a worker sends it, and of the rest."""
    stream = client.chat.completions.create(
        **{"model": "acme/tiny", "messages": MESSAGES, "logprobs": True, "top_logprobs": 1},
        stream=True,
    )
    next(stream)
    send_first(ledger, http_settings)
    first = next(stream).choices[0]
    assert first.logprobs is not None
    assert (first.delta.content, len(first.logprobs.content or ())) == ("é", 2)
    with working(ledger, told):
        *rest, end = [chunk.choices[0] for chunk in stream]
    assert (end.finish_reason, end.logprobs) == ("stop", None)
    found = [one for c in (first, *rest) if c.logprobs for one in c.logprobs.content or ()]
    assert [(one.token, one.logprob) for one in found] == [
        *[("\ufffd", -2.0)] * 2,
        (" 0", -2.0),
        ("<end>", -0.25),
    ]
    assert [one.token for one in found[2].top_logprobs] == [" 1"]
    with working(ledger, told):
        plain = client.completions.create(model="acme/tiny", prompt="Go", logprobs=0, stream=True)
        offsets = [c.choices[0].logprobs for c in plain]
    assert [at for one in offsets if one for at in one.text_offset or ()] == [0, 0, 1, 3]


def send_first(ledger: Ledger, settings: Settings) -> None:
    """The first piece of the one job that there is, whose result is `told`."""

    def job_ids() -> list[str]:
        with ledger.engine.connect() as connection:
            return [row.job_id for row in connection.execute(jobs.select())]

    (job_id,) = until("a job", job_ids)
    halves = [Token(token_id=i + 1, text="\ufffd", utf8=(b,), logprob=-2.0) for i, b in HALVES]
    sender = TextSender(resolve_broker(settings))
    sender.send([Piece(job_id, 0, "é", 0, tuple(halves))])
    sender.close()


HALVES = tuple(enumerate("é".encode()))


@on_sqlite
def test_tgis_stream_has_an_event_for_each_token(
    tgi: InferenceClient, ledger: Ledger, http_settings: Settings
) -> None:
    stream = tgi.text_generation("Go", stream=True, details=True, top_n_tokens=1)
    events = iter(stream)
    sending = threading.Thread(target=send_first, args=(ledger, http_settings))
    sending.start()
    seen = [next(events), next(events)]
    sending.join()
    with working(ledger, told):
        seen += events
    assert [event.index for event in seen] == [1, 2, 3, 4]
    assert [(e.token.id, e.token.text, e.token.logprob, e.token.special) for e in seen] == [
        (1, "", -2.0, False),
        (2, "é", -2.0, False),
        (3, " 0", -2.0, False),
        (0, "", -0.25, True),
    ]
    top: Any = seen[2].top_tokens
    assert [t["text"] for t in top] == [" 1"]
    assert [event.generated_text for event in seen] == [None, None, None, "é 0"]
    details = seen[-1].details
    assert details is not None
    assert (details.finish_reason, details.generated_tokens) == ("eos_token", 4)


@on_sqlite
def test_tgis_best_comes_first(tgi: InferenceClient, ledger: Ledger) -> None:
    with working(ledger, told):
        best = tgi.text_generation("Go", details=True, best_of=3, do_sample=True, seed=4)
        text = tgi.text_generation("Go", best_of=3, do_sample=True)
    assert [params.get("n") for params in sampling(ledger)] == [3, None]
    assert (best.generated_text, text) == ("é 2", "é 0")
    details = best.details
    assert details is not None
    assert (details.seed, details.generated_tokens) == (seed_of(4, 2), 4)
    others = details.best_of_sequences
    assert others is not None
    assert [(o.generated_text, o.finish_reason, len(o.tokens)) for o in others] == [
        ("é 1", "length", 4),
        ("é 0", "eos_token", 4),
    ]
    assert audit(ledger.engine) == []


@on_sqlite
def test_what_tgi_cannot_have_is_refused_by_name(tgi: InferenceClient, ledger: Ledger) -> None:
    refused: list[tuple[str, dict[str, Any]]] = [
        ("best_of", {"best_of": 17, "do_sample": True}),
        ("best_of", {"best_of": 2}),
        ("best_of", {"best_of": 2, "do_sample": True, "stream": True}),
        ("top_n_tokens", {"top_n_tokens": 21, "details": True}),
        ("top_n_tokens", {"top_n_tokens": 1}),
        ("typical_p", {"typical_p": 1.01}),
    ]
    for name, params in refused:
        with pytest.raises(ValidationError, match=f"^{name}: "):
            list(tgi.text_generation("Go", **params))
    assert sampling(ledger) == []


@on_sqlite
def test_our_own_api_tells_choices(http: httpx.Client, ledger: Ledger) -> None:
    job = {"prompt": "Go", "temperature": 0.5, "n": 2, "logprobs": True, "seed": 3}
    with working(ledger, told):
        where = http.post("/jobs", json=job).headers["Location"]
        result = http.get(where, params={"wait_s": 20}).json()["result"]
        where = http.post("/jobs", json={"prompt": "Go"}).headers["Location"]
        plain = http.get(where, params={"wait_s": 20}).json()["result"]
    assert [choice["text"] for choice in result["choices"]] == ["é 0", "é 1"]
    assert result["choices"][1]["tokens"][0] == {
        **{"token_id": 1, "text": "\ufffd", "utf8": [0xC3], "logprob": -1.75},
        **{"special": False, "top": []},
    }
    assert not {"choices", "discarded"} & set(plain)
    streamed = http.post("/jobs", json={**job, "stream": True})
    assert streamed.status_code == 422
    assert "stream: one text can be followed" in streamed.text
