"""Results with several texts in the ledger: read back, counted again, written to files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import ValidationError

from lorabatch import Job, Ledger, Settings
from lorabatch.candidates import MAX_CANDIDATES, seed_of
from lorabatch.job import SamplingParams
from lorabatch.ledger import Outcome
from lorabatch.rates import estimated_tokens
from lorabatch.result import Choice, LikelyToken, Token
from lorabatch.tables import results, usage_events
from lorabatch_producer import Producer
from lorabatch_producer.audit import audit
from lorabatch_producer.batch import submit
from lorabatch_producer.openai_choices import Logprobs
from lorabatch_producer.output import write_output
from tests.bad_inputs import CHAT, line, short
from tests.played_worker import run_queued, succeeds
from tests.told_choices import told

SEVERAL: dict[str, Any] = {"n": 3, "best_of": 5, "temperature": 1.0, "logprobs": True}


def test_choices_are_read_back_as_they_were_recorded(ledger: Ledger) -> None:
    ledger.accept([Job(job_id="several", prompt="p", sampling_params=SEVERAL)])
    (claim,) = ledger.claim(["several"], "me", 60).values()
    wanted = told(claim)
    ledger.record([Outcome(claim, wanted)])
    found = ledger.results(["several"])["several"]
    assert (found.choices, found.discarded) == (wanted.choices, wanted.discarded)
    assert found.usage == wanted.usage
    assert found.usage.output_tokens == 3 * 4 + 2 * 2
    assert found.texts == found.choices
    assert audit(ledger.engine) == []


def test_an_ordinary_job_stores_no_choices(ledger: Ledger) -> None:
    ledger.accept([Job(job_id="plain", prompt="p"), Job(job_id="cancelled", prompt="p")])
    ledger.cancel(["cancelled"])
    run_queued(ledger)
    with ledger.engine.connect() as connection:
        missing = sa.select(results.c.job_id).where(results.c.choices.is_(sa.null()))
        assert set(connection.scalars(missing)) == {"plain", "cancelled"}
    found = ledger.results(["plain"])["plain"]
    assert (found.choices, found.discarded) == (None, None)
    (only,) = found.texts
    assert (only.text, only.token_ids, only.seed) == (found.text, found.token_ids, found.seed)


def test_the_audit_counts_all_texts_again(ledger: Ledger) -> None:
    ledger.accept([Job(job_id="several", prompt="p", sampling_params=SEVERAL)])
    run_queued(ledger, told)
    with ledger.engine.begin() as connection:
        connection.execute(usage_events.update().values(output_tokens=4))
    found = {(d.subject, d.what): (d.seen, d.wanted) for d in audit(ledger.engine)}
    assert found["several", "usage output_tokens"] == (4, 16)
    assert found["tenant default", "sum of billable_tokens"] == (9, 21)


def test_what_a_cancelled_job_had_made_is_counted(ledger: Ledger) -> None:
    """There are no choices of it."""
    ledger.accept([Job(job_id="gone", prompt="p", sampling_params=SEVERAL)])
    (claim,) = ledger.claim(["gone"], "me", 60).values()
    usage = told(claim).usage.model_copy(update={"output_tokens": 6})
    result = succeeds(
        claim, state="cancelled", text=None, usage=usage, discarded=((1, 2), (), (3,), ())
    )
    ledger.record([Outcome(claim, result)])
    assert ledger.results(["gone"])["gone"].usage.output_tokens == 6
    assert audit(ledger.engine) == []


def test_every_database_takes_what_tokens_are(ledger: Ledger) -> None:
    """NUL is a token of many models, which PostgreSQL has no text for."""
    ledger.accept([Job(job_id="nul", prompt="p", sampling_params={"logprobs": True})])
    (claim,) = ledger.claim(["nul"], "me", 60).values()
    other = LikelyToken(token_id=8, text="\u2028 🙂", logprob=-9999.0)
    token = Token(token_id=7, text="\ufffd", utf8=(0,), logprob=-1.5, top=(other,))
    choice = Choice(text="\x00", token_ids=(7,), tokens=(token,))
    ledger.record([Outcome(claim, succeeds(claim, text="\x00", choices=(choice,)))])
    (found,) = ledger.results(["nul"])["nul"].choices or ()
    assert found == choice.model_copy(update={"text": "\ufffd"})
    assert found.tokens is not None
    assert found.tokens[0].raw == [0]


def test_rates_count_all_texts() -> None:
    plain = Job(prompt="four", sampling_params={"max_new_tokens": 10})
    several = Job(prompt="four", sampling_params={**SEVERAL, "max_new_tokens": 10})
    assert (estimated_tokens(plain), estimated_tokens(several)) == (11, 51)


@pytest.mark.parametrize(
    ("most", "params"),
    [
        (200_000 // 21, {"top_logprobs": 20}),
        (200_000 // 16 // 6, {"n": 16, "temperature": 1.0, "top_logprobs": 5}),
        (131_072, {}),
    ],
)
def test_a_result_has_room_for_what_is_told(most: int, params: dict[str, Any]) -> None:
    """Of one that tells too much, every step of its worker would wait seconds for it."""
    fits = {**params, "logprobs": True, "max_new_tokens": most}
    assert SamplingParams(**fits).max_new_tokens == most
    if most < 131_072:
        with pytest.raises(ValidationError, match=f"max_new_tokens may be {most}, not {most + 1}"):
            SamplingParams(**{**fits, "max_new_tokens": most + 1})


def test_each_text_has_a_seed_of_its_own() -> None:
    seeds = [seed_of(7, number) for number in range(MAX_CANDIDATES)]
    assert seeds[0] == 7
    assert len({*seeds, *(seed_of(8, number) for number in range(MAX_CANDIDATES))}) == 32
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_files_have_the_choices_of_their_lines(settings: Settings, tmp_path: Path) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {**CHAT, "n": 2, "logprobs": True}
    lines = [
        line(custom_id="chat", body=body),
        short(custom_id="short", prompt="a", **SEVERAL),
        short(custom_id="plain", prompt="b"),
    ]
    path.write_bytes(b"\n".join(lines))
    with Producer(settings) as producer:
        done = submit(producer, path)
        run_queued(producer.ledger, told)
        write_output(producer.ledger, done.batch_id, path, out)
    chat, several, plain = [json.loads(raw) for raw in out.read_text().splitlines()]
    choices = chat["response"]["body"]["choices"]
    assert [choice["message"]["content"] for choice in choices] == ["é 0", "é 1"]
    assert [len(choice["logprobs"]["content"]) for choice in choices] == [4, 4]
    assert [choice["text"] for choice in several["choices"]] == ["é 0", "é 1", "é 2"]
    assert several["usage"]["output_tokens"] == 16
    assert "choices" not in plain


def test_offsets_are_those_of_the_text_without_special_tokens() -> None:
    special = Token(token_id=1, text="<think>", logprob=-1.0, special=True)
    half = [Token(token_id=2, text="\ufffd", utf8=(byte,), logprob=-1.0) for byte in (0xC3, 0xA9)]
    last = Token(token_id=3, text=" a", logprob=-1.0)
    tokens = (special, *half, last, last)
    body = Logprobs(False).told(tokens)
    assert body is not None
    assert body["text_offset"] == [0, 0, 0, 1, 3]
    grown = Logprobs(False)
    parts = [grown.told(part) or {} for part in (tokens[:2], (), tokens[2:])]
    assert [at for part in parts for at in part["text_offset"]] == [0, 0, 0, 1, 3]
