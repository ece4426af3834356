"""Bulk files: both forms, every kind of bad line, identity, and output in input order."""

from __future__ import annotations

import io
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabatch import Ledger, Settings
from lorabatch.errors import IdempotencyConflict, JobNotFound, LoraBatchError
from lorabatch_producer import Producer
from lorabatch_producer.batch import batch_id_for, submit
from lorabatch_producer.bulk import MAX_LINE_BYTES, BadLine, GoodLine, base_names, read_lines
from lorabatch_producer.output import errors_path, write_output
from tests.bad_inputs import BAD_LINES, CHAT, chat, line, short
from tests.played_worker import by_adapter, run_queued

patient = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
BATCH = str(uuid.UUID(int=7))
BASE = frozenset({"tiny", "org/tiny"})


def read(content: bytes, batch_id: str = BATCH) -> list[GoodLine | BadLine]:
    return list(read_lines(io.BytesIO(content), batch_id, "acme", BASE))


def good(content: bytes) -> GoodLine:
    (found,) = read(content)
    assert isinstance(found, GoodLine), found
    return found


@pytest.mark.parametrize(
    ("raw", "code", "message"), [row[1:] for row in BAD_LINES], ids=[row[0] for row in BAD_LINES]
)
def test_a_bad_line_says_why_and_stops_nothing_else(raw: bytes, code: str, message: str) -> None:
    before, bad, after = read(short() + b"\n" + raw + b"\n" + short())
    assert isinstance(before, GoodLine)
    assert isinstance(after, GoodLine)
    assert isinstance(bad, BadLine)
    assert (bad.number, bad.code, after.number) == (2, code, 3)
    assert message in bad.message
    assert len(bad.message) < 400
    assert json.loads(bad.as_json())["line"] == 2


def test_the_last_line_may_lack_its_end_but_not_be_cut() -> None:
    assert isinstance(read(short())[0], GoodLine)
    cut = read(short() + b"\n" + short()[:20])[1]
    assert isinstance(cut, BadLine)
    assert cut.message.endswith("the file ends in the middle of this line")


def test_marks_blank_lines_and_line_ends_of_other_systems() -> None:
    lines = read(b"\xef\xbb\xbf" + short() + b"\r\n\r\n  \n" + short() + b"\r\n")
    assert [(type(found), found.number) for found in lines] == [(GoodLine, 1), (GoodLine, 4)]
    assert read(b"") == read(b"\n\n") == []


def test_a_line_just_as_long_as_allowed_is_not_too_long() -> None:
    room = MAX_LINE_BYTES - len(short(prompt=""))
    (found,) = read(short(prompt="x" * room) + b"\n")
    assert isinstance(found, BadLine)  # its prompt is too long, the line is not
    assert found.code == "invalid_job"


def test_a_custom_id_is_taken_by_the_first_good_line() -> None:
    lines = [short(custom_id="a", top_p=9), short(custom_id="a"), chat(), chat(), short()]
    found = read(b"\n".join(lines))
    assert [f.code if isinstance(f, BadLine) else "" for f in found] == [
        *("invalid_job", "", "", "duplicate_custom_id", "")
    ]


def test_a_chat_line_of_openai() -> None:
    found = good(
        chat(
            messages=[
                {"role": "developer", "content": "be short", "name": None},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": text} for text in "ab"],
                },
            ],
            max_completion_tokens=9,
            stop=["x", "y"],
            seed=3,
            top_k=5,
            min_p=0.1,
            repetition_penalty=1.1,
            frequency_penalty=0.5,
            presence_penalty=-0.5,
            ignore_eos=True,
            priority=7,
            n=1,
            stream=False,
            logprobs=None,
            tools=None,
            user="somebody",
            metadata={"a": "b"},
            response_format={"type": "text"},
        )
    )
    job, params = found.job, found.job.sampling_params
    assert (found.form, found.model, job.adapter_id, job.tenant) == ("chat", "sql", "sql", "acme")
    turns = [(message.role, message.content) for message in job.messages or ()]
    assert turns == [("system", "be short"), ("user", "ab")]
    assert (params.max_new_tokens, params.stop, params.seed, params.top_k) == (9, ("x", "y"), 3, 5)
    assert (params.min_p, params.repetition_penalty, params.ignore_eos) == (0.1, 1.1, True)
    assert (params.frequency_penalty, params.presence_penalty) == (0.5, -0.5)
    assert (params.temperature, job.priority, job.custom_id) == (1.0, 7, "x")


def test_defaults_are_openais_in_its_lines_and_ours_in_short_ones() -> None:
    completion = good(line(url="/v1/completions", body={"model": "sql", "prompt": "a"}))
    assert completion.form == "completion"
    assert completion.job.sampling_params.temperature == 1.0
    assert completion.job.sampling_params.max_new_tokens == 16
    assert good(chat()).job.sampling_params.max_new_tokens == 256
    ours = good(short())
    assert (ours.form, ours.job.sampling_params.temperature) == ("short", 0.0)


@pytest.mark.parametrize("model", ["tiny", "org/tiny"])
def test_the_base_models_name_is_no_adapter(model: str) -> None:
    found = good(chat(model=model))
    assert (found.job.adapter_id, found.model) == (None, model)


def test_the_base_models_names() -> None:
    def names(**fields: Any) -> set[str]:
        return set(base_names(Settings.load(**fields)))

    assert names(base_model="org/tiny@v1") == {"org/tiny@v1", "org/tiny", "tiny"}
    assert names(base_model="/models/tiny/") == {"/models/tiny/", "tiny"}
    assert names(base_model="org/tiny", base_model_aliases="t", adapters="tiny=org/x") == {
        *("org/tiny", "t")
    }


def test_the_short_form() -> None:
    found = good(
        short(tenant="b", temperature=0.5, sampling_params={"seed": 4}, priority=2, custom_id="c")
    ).job
    assert (found.tenant, found.priority, found.custom_id) == ("b", 2, "c")
    assert (found.sampling_params.temperature, found.sampling_params.seed) == (0.5, 4)
    assert good(short(adapter_id=None)).job.adapter_id is None
    chatty = good(short(prompt=None, messages=[{"role": "user", "content": "hi"}])).job
    assert chatty.messages is not None


def test_ids_follow_from_batch_and_custom_id_or_line() -> None:
    content = short(custom_id="2") + b"\n" + short()
    first = [f.job.job_id for f in read(content) if isinstance(f, GoodLine)]
    assert first == [f.job.job_id for f in read(content) if isinstance(f, GoodLine)]
    other = [f.job.job_id for f in read(content, str(uuid.uuid4())) if isinstance(f, GoodLine)]
    assert len({*first, *other}) == 4
    assert batch_id_for("a", "d") == batch_id_for("a", "d") != batch_id_for("b", "d")
    assert batch_id_for("a", "d", new=True) != batch_id_for("a", "d", new=True)


@patient
@given(st.binary(max_size=300))
def test_no_bytes_can_make_it_raise(content: bytes) -> None:
    assert len(read(content)) <= len(content.split(b"\n"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from([*CHAT, "temperature", "stop", "n", "tools", "max_tokens", "custom_id"])


@patient
@given(st.dictionaries(names, json_values), st.sampled_from(["chat", "short", "line"]))
def test_no_values_can_make_it_raise(fields: dict[str, Any], form: str) -> None:
    raw = {"chat": chat, "short": short, "line": line}[form](**fields)
    assert [found.number for found in read(raw)] == [1]


@patient
@given(st.lists(st.sampled_from([short(), chat(), b"{", b"", b"\xff"]), max_size=30))
def test_every_line_is_accounted_for(lines: list[bytes]) -> None:
    found = read(b"\n".join(lines))
    assert [f.number for f in found] == [i for i, raw in enumerate(lines, 1) if raw]


# -- submission and output --------------------------------------------------------------------


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
    written = write_output(producer.ledger, producer.settings, done.batch_id, file, out)
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
    write_output(producer.ledger, producer.settings, done.batch_id, path, out)
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
    def interrupt(ledger: Ledger, job_ids: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "in"
    path.write_bytes(b"\n".join(short(prompt=f"p{i}") for i in range(1500)))
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "mark_sent", interrupt)
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


def test_output_of_open_jobs_needs_partial(producer: Producer, file: Path, tmp_path: Path) -> None:
    done, out = submit(producer, file), tmp_path / "out"
    arguments = (producer.ledger, producer.settings, done.batch_id, file, out)
    with pytest.raises(LoraBatchError, match="5 of 5 jobs are open"):
        write_output(*arguments)
    assert not out.exists()
    assert write_output(*arguments, partial=True).not_finished == 5
    assert {o["error"]["code"] for o in output(out)} == {"not_finished"}


def test_a_cancelled_job_says_so_in_the_output(producer: Producer, tmp_path: Path) -> None:
    path, out = tmp_path / "in", tmp_path / "out"
    path.write_bytes(short() + b"\n" + chat())
    done = submit(producer, path)
    ids = [message.job_id for message in producer.ledger.nowhere(-1)]
    assert set(producer.cancel(ids).values()) == {"cancelled"}
    written = write_output(producer.ledger, producer.settings, done.batch_id, path, out)
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
        write_output(producer.ledger, producer.settings, batch_id, path, out)

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

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_output(producer.ledger, producer.settings, done.batch_id, file, out)
    assert out.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["home", "in.jsonl", "out"]
