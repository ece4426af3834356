"""Bulk files from submission to output, in input order, again and after interruptions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lorabatch import Settings
from lorabatch.errors import IdempotencyConflict, JobNotFound, LoraBatchError
from lorabatch.feed import Feed
from lorabatch.stopping import stop_exhausted
from lorabatch_producer import Producer, batch
from lorabatch_producer.batch import Limits, batch_id_for, submit
from lorabatch_producer.bulk import BadLine
from lorabatch_producer.output import errors_path, write_output
from lorabatch_producer.sending import CHUNK, chunked
from tests.bad_inputs import CHAT, chat, line, short
from tests.played_worker import by_adapter, fails, run_queued


@pytest.fixture
def producer(settings: Settings) -> Iterator[Producer]:
    with Producer(settings) as producer:
        yield producer


@pytest.fixture
def file(tmp_path: Path) -> Path:
    lines = [
        line(custom_id="chat", body={**CHAT, "max_tokens": 4}),
        b"no json",
        line(custom_id="text", url="/v1/completions", body={"model": "sql", "prompt": "two"}),
        short(prompt="three", tenant="other"),
        short(prompt="four", adapter_id="broken", custom_id="=cmd()"),
        line(custom_id="gone", body={**CHAT, "model": "broken"}),
    ]
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def output(out: Path) -> list[dict[str, Any]]:
    return [json.loads(raw) for raw in out.read_text().splitlines()]


def test_a_file_from_submission_to_output(producer: Producer, file: Path, tmp_path: Path) -> None:
    bad: list[BadLine] = []
    done = submit(producer, file, "acme", on_bad=bad.append)
    assert (done.accepted, done.rejected, done.not_sent) == (5, 1, None)
    assert [(b.number, b.code) for b in bad] == [(2, "not_json")]
    run_queued(producer.ledger, by_adapter)
    status = producer.status(done.batch_id)
    assert (status.total, status.ended, status.succeeded, status.failed) == (5, 5, 3, 2)
    assert (status.tenant, status.rejected_lines) == ("acme", 1)
    assert status.source.startswith("in.jsonl sha256:")
    out = tmp_path / "out.jsonl"
    written = write_output(producer.ledger, done.batch_id, file, out)
    assert (written.succeeded, written.failed, written.bad) == (3, 2, 1)
    chat_line, text_line, short_line, failed, gone = output(out)
    body = chat_line["response"]["body"]
    assert (chat_line["custom_id"], chat_line["error"]) == ("chat", None)
    assert chat_line["response"]["status_code"] == 200
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "sql: hi"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert (body["object"], body["model"]) == ("chat.completion", "sql")
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert text_line["response"]["body"]["choices"][0]["text"] == "sql: two"
    assert text_line["response"]["body"]["object"] == "text_completion"
    assert (short_line["line"], short_line["tenant"]) == (4, "other")
    assert (short_line["text"], short_line["usage"]["total_tokens"]) == ("sql: three", 8)
    assert (failed["custom_id"], failed["text"]) == ("=cmd()", None)
    assert failed["error"]["code"] == "unknown_adapter"
    assert (gone["response"], gone["error"]["code"]) == (None, "unknown_adapter")
    (bad_line,) = output(tmp_path / "out.errors.jsonl")
    assert (bad_line["line"], bad_line["custom_id"], bad_line["code"]) == (2, None, "not_json")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        *("in.jsonl", "out.errors.jsonl", "out.jsonl")
    ]


def test_output_keeps_the_order_of_1200_lines(producer: Producer, tmp_path: Path) -> None:
    path, out = tmp_path / "in", tmp_path / "out"
    path.write_bytes(b"\n".join(short(prompt=f"p{i}", custom_id=f"c{i}") for i in range(1200)))
    done = submit(producer, path)
    assert len(run_queued(producer.ledger)) == 1200
    write_output(producer.ledger, done.batch_id, path, out)
    assert [(o["custom_id"], o["text"]) for o in output(out)] == [
        (f"c{i}", f"sql: p{i}") for i in range(1200)
    ]
    assert not errors_path(out).exists()


def test_the_same_file_again_is_the_same_jobs(producer: Producer, file: Path) -> None:
    first = submit(producer, file, "acme")
    run_queued(producer.ledger)
    assert submit(producer, file, "acme") == first
    assert producer.ledger.counts() == {"succeeded": 5}
    moved = file.rename(file.with_name("renamed.jsonl"))
    assert submit(producer, moved, "acme") == first
    assert submit(producer, moved, "other").batch_id != first.batch_id
    assert submit(producer, moved, "acme", new=True).batch_id != first.batch_id
    assert producer.ledger.counts() == {"succeeded": 5, "queued": 10}


def test_an_interrupted_submission_is_taken_up_where_it_was(
    producer: Producer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(feed: Feed, job_ids: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "in"
    path.write_bytes(b"\n".join(short(prompt=f"p{i}") for i in range(1500)))
    with monkeypatch.context() as patched:
        patched.setattr(Feed, "take_these", interrupt)
        with pytest.raises(KeyboardInterrupt):
            submit(producer, path)
    assert producer.ledger.counts() == {"queued": 1000}
    done = submit(producer, path)
    assert (done.accepted, producer.ledger.counts()) == (1500, {"queued": 1500})


def test_a_broker_that_is_down_leaves_the_batch_accepted(settings: Settings, file: Path) -> None:
    down = settings.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"})
    with Producer(down) as producer:
        done = submit(producer, file, "acme")
        assert done.not_sent is not None
        assert len(done.not_sent.job_ids) == producer.status(done.batch_id).queued == 5


def test_the_same_file_read_otherwise_is_refused(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(chat(model="tiny"))
    with Producer(settings) as producer:
        submit(producer, path)
    with Producer(settings.model_copy(update={"base_model": "org/tiny"})) as producer:
        with pytest.raises(IdempotencyConflict, match="LORABATCH_BASE_MODEL"):
            submit(producer, path)
        assert submit(producer, path, new=True).accepted == 1


def test_a_file_that_grows_meanwhile_is_noticed(producer: Producer, file: Path) -> None:
    def grow(bad: BadLine) -> None:
        with file.open("ab") as more:
            more.write(b"\n" + short())

    with pytest.raises(LoraBatchError, match=r"in\.jsonl changed while it was read"):
        submit(producer, file, on_bad=grow)


def test_what_was_accepted_of_a_file_that_was_interrupted_is_known(
    producer: Producer, tmp_path: Path
) -> None:
    path = tmp_path / "in"
    good = [short(prompt=f"p{n}") for n in range(CHUNK)]
    path.write_bytes(b"\n".join([b"bad", *good, b"bad", short(prompt="last")]))

    stop_at = CHUNK + 2

    def interrupt(bad: BadLine) -> None:
        if bad.number == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        submit(producer, path, "acme", on_bad=interrupt)
    batch_id = batch_id_for("acme", hashlib.sha256(path.read_bytes()).hexdigest())
    status = producer.status(batch_id)
    assert (status.queued, status.rejected_lines, status.tenant) == (CHUNK, 2, "acme")
    assert submit(producer, path, "acme").batch_id == batch_id
    assert producer.status(batch_id).queued == CHUNK + 1
    stop_at = 1
    with pytest.raises(KeyboardInterrupt):
        submit(producer, path, "acme", on_bad=interrupt)
    assert producer.status(batch_id).rejected_lines == 2, "no fewer than were seen before"


def test_output_of_open_jobs_needs_partial(producer: Producer, file: Path, tmp_path: Path) -> None:
    done, out = submit(producer, file), tmp_path / "out"
    arguments = (producer.ledger, done.batch_id, file, out)
    with pytest.raises(LoraBatchError, match="5 of 5 jobs are open"):
        write_output(*arguments)
    assert not out.exists()
    assert write_output(*arguments, partial=True).not_finished == 5
    assert {o["error"]["code"] for o in output(out)} == {"not_finished"}


def test_a_cancelled_job_says_so_in_the_output(producer: Producer, tmp_path: Path) -> None:
    path, out = tmp_path / "in", tmp_path / "out"
    path.write_bytes(short() + b"\n" + chat())
    done = submit(producer, path)
    ids = [message.job_id for message in Feed(producer.ledger.engine, "lorabatch").nowhere(-1)]
    assert set(producer.cancel(ids).values()) == {"cancelled"}
    written = write_output(producer.ledger, done.batch_id, path, out)
    assert written.cancelled == 2
    assert [o["error"]["code"] for o in output(out)] == ["job_cancelled"] * 2


def test_output_refuses_what_is_not_its_file(
    producer: Producer, file: Path, tmp_path: Path
) -> None:
    done = submit(producer, file)
    run_queued(producer.ledger)
    other = tmp_path / "other.jsonl"
    other.write_bytes(short())

    def write(batch_id: str, path: Path, out: Path) -> None:
        write_output(producer.ledger, batch_id, path, out)

    with pytest.raises(LoraBatchError, match="is not that file"):
        write(done.batch_id, other, tmp_path / "out")
    with pytest.raises(LoraBatchError, match="would replace its input"):
        write(done.batch_id, file, file)
    with pytest.raises(JobNotFound, match="'nobody': no such batch"):
        write("nobody", file, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["home", "in.jsonl", "other.jsonl"]


def test_a_failed_write_leaves_the_old_output(
    producer: Producer, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, out = submit(producer, file), tmp_path / "out"
    run_queued(producer.ledger)
    out.write_text("old")

    sync = os.fsync
    left = [sync]

    def full(number: int) -> None:
        """The first of the two files fits."""
        (left.pop() if left else no_room)(number)

    def no_room(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LoraBatchError, match=r"out cannot be written: No space left"):
        write_output(producer.ledger, done.batch_id, file, out)
    assert out.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["home", "in.jsonl", "out"]


def test_an_output_that_is_half_there_says_so(
    producer: Producer, file: Path, tmp_path: Path
) -> None:
    done, out = submit(producer, file), tmp_path / "out"
    run_queued(producer.ledger)
    (out.parent / "out.errors.jsonl").mkdir()
    with pytest.raises(LoraBatchError, match=r"out\.errors\.jsonl cannot .*/out is the new one:"):
        write_output(producer.ledger, done.batch_id, file, out)
    assert len(output(out)) == 5


def test_an_input_that_cannot_be_read_is_not_the_outputs_fault(
    producer: Producer, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, out = submit(producer, file), tmp_path / "out"
    run_queued(producer.ledger)

    def torn(*_: object) -> Iterator[BadLine]:
        yield BadLine(1, None, "x", "x")
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("lorabatch_producer.inputs.Inputs.lines", torn)
    with pytest.raises(LoraBatchError, match=r"in\.jsonl cannot be read: Input/output error"):
        write_output(producer.ledger, done.batch_id, file, out)
    file.unlink()
    with pytest.raises(LoraBatchError, match=r"in\.jsonl cannot be read: No such file"):
        write_output(producer.ledger, done.batch_id, file, out)
    assert os.listdir(tmp_path) == ["home"]


def test_a_share_counts_what_failed_while_the_files_were_read(
    producer: Producer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "chunked", lambda lines: chunked(lines, 1))
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([short(), short(), b"no json", short(), short()]))
    failing = partial(run_queued, producer.ledger, fails)
    found = submit(producer, path, on_bad=lambda _: failing(), limits=Limits(None, 0.5))
    budget = producer.status(found.batch_id).budget
    assert budget.exhausted == "2 jobs have failed, and it stops at 2"
    assert stop_exhausted(producer.ledger.engine) == {found.batch_id: {"cancelled": 2, "asked": 0}}
