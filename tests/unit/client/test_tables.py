"""Results as tables: documented types, nothing lost on the way to a file and back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pytest
from pyarrow import parquet

from lorabatch import ErrorInfo, Ledger, Result, Usage
from lorabatch.errors import SettingsError
from lorabatch.result import Choice
from lorabatch.rows import moment
from lorabatch_producer.tables import COLUMNS, to_arrow, to_pandas, to_reader
from tests.played_worker import by_adapter, run_queued

AT_US = 1_780_000_000_123_456
SEED = 2**63 - 1
GOOD = Result(
    job_id="good",
    tenant="acme",
    adapter_id="sql",
    adapter_version="v1",
    base_model="tiny",
    custom_id="line 1",
    batch_id="b",
    state="succeeded",
    text="naïve 🦜",
    token_ids=(1, 2, 3),
    finish_reason="length",
    seed=SEED,
    usage=Usage(prompt_tokens=5, output_tokens=3, cached_tokens=2),
    attempt=1,
    submitted_us=AT_US,
    started_us=AT_US + 1,
    finished_us=AT_US + 2,
)
BAD = Result(
    job_id="bad",
    tenant="acme",
    adapter_id=None,
    state="failed",
    error=ErrorInfo(code="oom", message="no memory"),
)


def test_a_row_has_all_of_a_result() -> None:
    good, bad = to_arrow([GOOD, BAD]).to_pylist()
    times = {name: good.pop(name) for name in ("submitted_at", "started_at", "finished_at")}
    moments = [moment(AT_US + n) for n in range(3)]
    assert list(times.values()) == moments
    assert good == {
        **{name: getattr(GOOD, name) for name in COLUMNS if hasattr(GOOD, name)},
        "token_ids": [1, 2, 3],
        "prompt_tokens": 5,
        "cached_tokens": 2,
        "output_tokens": 3,
        "total_tokens": 8,
        "error_code": None,
        "error_message": None,
    }
    said = {name: value for name, value in bad.items() if value not in (None, 0, [])}
    assert said == {
        **{"job_id": "bad", "tenant": "acme", "state": "failed"},
        **{"error_code": "oom", "error_message": "no memory"},
    }


def test_no_text_is_lost_of_several() -> None:
    choices = tuple(Choice(text=text, token_ids=(1,)) for text in "ab")
    (row,) = to_arrow([GOOD.model_copy(update={"choices": choices})]).to_pylist()
    assert [one["text"] for one in json.loads(row["choices"])] == ["a", "b"]


@pytest.mark.parametrize("results", [[GOOD, BAD], []])
def test_types_are_those_that_are_documented(results: list[Result], tmp_path: Path) -> None:
    table = to_arrow(results)
    kinds = {field.name: re.sub("<.*: ", "<", str(field.type)) for field in table.schema}
    assert kinds == COLUMNS
    parquet.write_table(table, tmp_path / "results.parquet")
    again = parquet.read_table(tmp_path / "results.parquet")
    assert again.to_pylist() == table.to_pylist()
    assert again.schema.types == table.schema.types


def test_pandas_loses_no_digit(tmp_path: Path) -> None:
    frame = to_pandas([GOOD, BAD])
    assert {str(kind) for kind in frame.dtypes} >= {"int64[pyarrow]", "string[pyarrow]"}
    assert (frame["seed"][0], frame["seed"].isna()[1]) == (SEED, True)
    assert frame["finished_at"].dt.tz is not None
    frame.to_parquet(tmp_path / "results.parquet")
    again = pandas.read_parquet(tmp_path / "results.parquet", dtype_backend="pyarrow")
    assert pyarrow.Table.from_pandas(again).to_pylist() == to_arrow([GOOD, BAD]).to_pylist()


def test_a_batch_streams(producer: Any, ledger: Ledger, tmp_path: Path) -> None:
    asked = [{"prompt": f"p{n}", "batch_id": "b", "custom_id": str(n)} for n in range(25)]
    producer.enqueue_many([{**asked[0], "adapter_id": "broken"}, *asked[1:]])
    run_queued(ledger, by_adapter)
    read = 0

    def counted() -> Any:
        nonlocal read
        for result in producer.results("b"):
            read += 1
            yield result

    reader = to_reader(counted(), rows=10)
    with parquet.ParquetWriter(tmp_path / "b.parquet", reader.schema) as file:
        file.write_batch(reader.read_next_batch())
        assert read == 10
        for batch in reader:
            file.write_batch(batch)
    found = parquet.read_table(tmp_path / "b.parquet").to_pylist()
    assert sorted(int(row["custom_id"]) for row in found) == list(range(25))
    assert [row["custom_id"] for row in found if row["error_code"] == "unknown_adapter"] == ["0"]


def test_without_the_extra_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SettingsError, match=r"pyarrow is not installed; pip install 'lorabatch\[t"):
        to_arrow([])


def test_importing_it_loads_neither() -> None:
    heavy = "{'pandas', 'pyarrow', 'numpy'}"
    code = f"import sys, lorabatch_producer.tables; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
