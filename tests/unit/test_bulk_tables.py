"""Tables and foreign rows as batches: what rows mean, which are bad, and results in their order."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from lorabatch import Settings
from lorabatch.errors import InvalidJob, LoraBatchError
from lorabatch.result import Choice
from lorabatch_producer import Producer, table_rows
from lorabatch_producer.batch import reading_of, submit
from lorabatch_producer.bulk import BadLine, GoodLine
from lorabatch_producer.inputs import Inputs, gathered
from lorabatch_producer.output import write_output
from lorabatch_producer.reading import Reading
from tests.played_worker import by_adapter, run_queued, succeeds

BATCH = "1f0f6c34-9a4d-5e0e-8c55-6d0a54f5a1b0"
FAQ = Reading(
    prompt_template="Answer: {question}", adapter_column="model", sampling={"max_new_tokens": 7}
)


@pytest.fixture
def producer(settings: Settings) -> Iterator[Producer]:
    with Producer(settings) as producer:
        yield producer


def written(path: Path, text: str) -> Path:
    path.write_text(text, newline="")
    return path


def lines(inputs: Inputs) -> list[GoodLine | BadLine]:
    inputs.check()
    return list(inputs.lines(BATCH, "acme", frozenset({"base"})))


def test_rows_of_csv_are_jobs_and_bad_ones_are_named_by_line(tmp_path: Path) -> None:
    text = (
        "\ufeffquestion,model,id,temperature\r\n"
        'one,sql,1,0.5\r\n"two\nlines",base,2,\r\n\r\nfew,sql\r\nthree,,3,\r\n'
        "four,sql,1,\r\nfive,sql,5,hot\r\nsix,sql,6,\r\n"
    )
    reading = FAQ.model_copy(update={"custom_id_column": "id"})
    found = lines(Inputs.of(written(tmp_path / "faq.csv", text), reading))
    good = [line for line in found if isinstance(line, GoodLine)]
    assert [(g.number, g.job.custom_id, g.job.prompt, g.job.adapter_id) for g in good] == [
        (2, "1", "Answer: one", "sql"),
        (3, "2", "Answer: two\nlines", None),
        (10, "6", "Answer: six", "sql"),
    ]
    assert good[0].job.sampling_params.model_dump(exclude_unset=True) == {
        "temperature": 0.5,
        "max_new_tokens": 7,
    }
    bad = [(line.number, line.file, line.code) for line in found if isinstance(line, BadLine)]
    assert bad == [
        (6, "faq.csv", "columns"),
        (7, "faq.csv", "invalid_job"),
        (8, "faq.csv", "duplicate_custom_id"),
        (9, "faq.csv", "invalid_job"),
    ]


def test_rows_that_are_no_csv_take_no_other_along(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(b'prompt\nok\n"a"b\nt\xff\n' + b"x" * 9_000_000 + b"\nlast\n")
    found = lines(Inputs.of(path, Reading(adapter="sql")))
    codes = [(one.number, one.code) for one in found if isinstance(one, BadLine)]
    assert codes == [(3, "not_csv"), (4, "not_utf8"), (5, "not_csv")]
    assert [one.number for one in found if isinstance(one, GoodLine)] == [2, 6]


def test_the_same_rows_in_each_format_are_the_same_jobs(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "model": "sql"} for n in range(3)]
    table = written(tmp_path / "a.csv", "question,model\nq0,sql\nq1,sql\nq2,sql\n")
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    objects = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    packed = tmp_path / "b.csv.gz"
    packed.write_bytes(gzip.compress(table.read_bytes()))
    made = {}
    for path in (table, tmp_path / "a.parquet", objects, packed):
        found = lines(Inputs.of(path, FAQ))
        made[path.name] = [
            (g.job.prompt, g.job.adapter_id) for g in found if isinstance(g, GoodLine)
        ]
    assert made["a.csv"] == [(f"Answer: q{n}", "sql") for n in range(3)]
    assert all(one == made["a.csv"] for one in made.values())
    assert Inputs.of(packed, FAQ).digest() == Inputs.of(table, FAQ).digest(), "one batch"
    other = FAQ.model_copy(update={"system": "be kind"})
    assert Inputs.of(table, other).digest() != Inputs.of(table, FAQ).digest(), "another batch"


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        (Reading(adapter="sql"), "in.csv: no column 'prompt'; it has 'question', 'model'"),
        (Reading(prompt_column="text", base=True), "no column 'text'"),
        (Reading(prompt_template="{a.b}", base=True), "no column 'a.b'"),
        (Reading(prompt_template="{question!r}", base=True), "wanted columns by name alone"),
        (Reading(prompt_template="{question:>9}", base=True), "wanted columns by name alone"),
        (Reading(prompt_template="{question", base=True), "expected '}'"),
        (Reading(prompt_template="hello", base=True), "names no column"),
        (Reading(prompt_column="question"), "no row would name an adapter"),
        (Reading(prompt_column="question", adapter_column="x"), "no column 'x'"),
        (Reading(prompt_column="question", base=True, adapter="sql"), "give one of them"),
        (Reading(prompt_column="question", base=True, sampling={"top_p": 2.0}), "top_p: "),
    ],
)
def test_what_no_row_could_be_read_by_is_refused_first(
    producer: Producer, tmp_path: Path, reading: Reading, message: str
) -> None:
    path = written(tmp_path / "in.csv", "question,model\none,sql\n")
    with pytest.raises((InvalidJob, LoraBatchError)) as refused:
        submit(producer, Inputs.of(path, reading))
    assert message in str(refused.value)
    assert producer.ledger.counts() == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", b"", "empty; wanted a first line"),
        ("in.csv", b"a,a\n", "two columns are called 'a'"),
        ("in.parquet", b"no", "not a Parquet file"),
        ("in.jsonl.gz", gzip.compress(b"x" * 9999, mtime=0)[:-9], "not a whole gzip file"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    producer: Producer, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(LoraBatchError, match=f"{name}: {message}"):
        submit(producer, Inputs.of(path))


@pytest.mark.parametrize("at", [4, 60])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, at: int) -> None:
    path = tmp_path / "in.parquet"
    table = arrow.table({"prompt": [f"text {n}" for n in range(900)]})
    parquet.write_table(table, path, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[at : at + 40] = bytes(byte ^ 0x5A for byte in content[at : at + 40])
    path.write_bytes(content)
    with pytest.raises(LoraBatchError, match=r"in\.parquet: not a Parquet file that can be read: "):
        lines(Inputs.of(path, Reading(base=True)))


def test_without_pyarrow_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(table_rows.importlib, "import_module", missing)
    path = written(tmp_path / "in.parquet", "PAR1")
    with pytest.raises(LoraBatchError, match=r"Parquet needs pyarrow: pip install 'lorabatch\[ta"):
        Inputs.of(path).check()


def test_several_files_are_one_batch(producer: Producer, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for name in ("b.jsonl", "a.jsonl", "x/a.jsonl"):
        written(tmp_path / name, json.dumps({"adapter_id": "sql", "prompt": name}) + "\nbad\n")
    bad: list[BadLine] = []
    with gathered([str(tmp_path / "*.jsonl"), str(tmp_path / "x/a.jsonl")], Reading()) as inputs:
        done = submit(producer, inputs, on_bad=bad.append)
        assert (done.accepted, done.rejected) == (3, 3)
        assert [(one.file, one.number) for one in bad] == [
            (str(tmp_path / "a.jsonl"), 2),
            ("b.jsonl", 2),
            (str(tmp_path / "x/a.jsonl"), 2),
        ]
        assert submit(producer, inputs).batch_id == done.batch_id
        run_queued(producer.ledger)
        out = tmp_path / "out"
        write_output(producer.ledger, done.batch_id, inputs, out)
    texts = [json.loads(raw)["text"] for raw in out.read_text().splitlines()]
    assert texts == ["sql: a.jsonl", "sql: b.jsonl", "sql: x/a.jsonl"]
    assert producer.ledger.counts() == {"succeeded": 3}
    with (
        pytest.raises(LoraBatchError, match="given twice"),
        gathered([str(tmp_path / "b.jsonl")] * 2, Reading()),
    ):
        pass
    for name, message in (("none*", "does not exist"), ("x", "is a folder")):
        with (
            pytest.raises(LoraBatchError, match=message),
            gathered([str(tmp_path / name)], Reading()),
        ):
            pass


def test_results_as_tables_in_the_order_of_the_input(producer: Producer, tmp_path: Path) -> None:
    text = 'prompt,adapter_id,=note\n"=cmd()",sql,"a\nb"\ntwo,broken,@x\nthree,sql,\n'
    path = written(tmp_path / "in.csv", text)
    batch_id = submit(producer, path, "acme").batch_id
    run_queued(producer.ledger, by_adapter)
    inputs = Inputs.of(path, reading_of(producer.ledger, batch_id))
    for name in ("out.csv", "out.parquet", "out.jsonl"):
        write_output(producer.ledger, batch_id, inputs, tmp_path / name, with_input=True)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert [row["input_prompt"] for row in rows] == ["'=cmd()", "two", "three"]
    assert [row["input_=note"] for row in rows] == ["a\nb", "'@x", ""]
    assert [(row["custom_id"], row["text"]) for row in rows] == [
        ("in.csv:2", "sql: =cmd()"),
        ("in.csv:4", ""),
        ("in.csv:5", "sql: three"),
    ]
    assert (rows[0]["output_tokens"], rows[1]["error_code"]) == ("3", "unknown_adapter")
    typed = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["line"], row["text"], row["prompt_tokens"]) for row in typed] == [
        (2, "sql: =cmd()", 5),
        (4, None, 5),
        (5, "sql: three", 5),
    ]
    assert typed[0]["input_=note"] == "a\nb"
    objects = [json.loads(raw) for raw in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert objects[1]["input"] == {"prompt": "two", "adapter_id": "broken", "=note": "@x"}
    other = written(tmp_path / "other.csv", text + "x,y,z\n")
    with pytest.raises(LoraBatchError, match="is not that file"):
        write_output(producer.ledger, batch_id, other, tmp_path / "no.csv")


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, form: str) -> None:
    """100,000 rows of 300 bytes; a list of their texts alone would have 30 MB."""
    path, count = tmp_path / f"in.{form}", 100_000
    if form == "csv":
        written(path, "prompt\n" + ("x" * 299 + "\n") * count)
    else:
        parquet.write_table(arrow.table({"prompt": ["x" * 299] * count}), path)
    rows = Inputs.of(path, Reading(adapter="sql"))
    tracemalloc.start()
    try:
        with rows.sources[0].open() as file:
            read = sum(len(str(row)) > 299 for _, row in rows._rows(rows.sources[0], file, False))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == count
    assert peak < 4_000_000


@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
def test_a_table_has_all_texts_of_a_job(producer: Producer, tmp_path: Path, name: str) -> None:
    path, out = written(tmp_path / "in.csv", "prompt,n,temperature\nhi,2,1\n"), tmp_path / name
    inputs = Inputs.of(path, Reading(base=True))
    batch_id = submit(producer, inputs).batch_id
    choices = tuple(Choice(text=text, token_ids=(1,)) for text in "ab")
    run_queued(producer.ledger, lambda claim: succeeds(claim, text="a", choices=choices))
    write_output(producer.ledger, batch_id, inputs, out)
    if name.endswith("csv"):
        (row,) = csv.DictReader(io.StringIO(out.read_text()))
    else:
        (row,) = parquet.read_table(out).to_pylist()
    assert [one["text"] for one in json.loads(row["choices"])] == ["a", "b"]
