"""Lines of bulk files: both forms, every kind of bad line, and identity."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import uuid
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabatch import Settings
from lorabatch_producer.batch import batch_id_for
from lorabatch_producer.bulk import MAX_LINE_BYTES, BadLine, GoodLine, base_names, read_lines
from tests.bad_inputs import BAD_LINES, CHAT, chat, line, short

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


def test_a_field_given_twice_is_found_in_time_however_many_there_are() -> None:
    """A line that took hours would hold up all batches of its server."""
    code = (
        "import io\n"
        "from lorabatch_producer.jsonl import Refused, json_rows\n"
        "fields = ','.join(f'\"{n}\":0' for n in [*range(200_000), 199_999])\n"
        "((_, row),) = json_rows(io.BytesIO(('{' + fields + '}').encode()))\n"
        "assert isinstance(row, Refused)\n"
        "assert \"the field '199999' is given twice\" in str(row)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
