"""Results as tables of Arrow and pandas, one row a job: `pip install 'lorabatch[tables]'`.

    with Producer() as producer:
        results = producer.results("my-batch")
        parquet.write_table(to_arrow(results), "results.parquet")

COLUMNS says what there is. Times are UTC to the microsecond, tokens counts; `text` and
`finish_reason` are null unless the job succeeded, `error_code` and `error_message` are null if it
did, and `token_ids` are those generated. `choices` is JSON where several texts or log probabilities
were asked for: `text`, `token_ids` and `finish_reason` are of the first one. All take an iterable
of results and read it once; `to_reader` never holds more than a batch of rows. Raises SettingsError
where pyarrow or pandas is missing, and what the iterable raises.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from lorabatch import Result
from lorabatch.errors import SettingsError
from lorabatch_producer.sending import chunked

if TYPE_CHECKING:  # neither says its types
    import pandas  # type: ignore[import-untyped]
    import pyarrow  # type: ignore[import-untyped]

__all__ = ["COLUMNS", "to_arrow", "to_pandas", "to_reader"]

ROWS = 1000
TIME: Final = "timestamp[us, tz=UTC]"
COLUMNS: Final = {
    "job_id": "string",
    "tenant": "string",
    "batch_id": "string",
    "custom_id": "string",
    "adapter_id": "string",
    "adapter_version": "string",
    "base_model": "string",
    "state": "string",
    "text": "string",
    "token_ids": "list<int32>",
    "choices": "string",
    "finish_reason": "string",
    "prompt_tokens": "int64",
    "cached_tokens": "int64",
    "output_tokens": "int64",
    "total_tokens": "int64",
    "error_code": "string",
    "error_message": "string",
    "seed": "int64",
    "attempt": "int64",
    "submitted_at": TIME,
    "started_at": TIME,
    "finished_at": TIME,
}
"""Names and Arrow types. Of pandas the same types, as `pandas.ArrowDtype`, because its own make a
seed that may be missing a float, and lose digits of it."""


def to_reader(results: Iterable[Result], rows: int = ROWS) -> pyarrow.RecordBatchReader:
    """Record batches of so many rows, each made when it is asked for."""
    arrow = _installed("pyarrow")
    schema = _schema(arrow)

    def batches() -> Iterator[pyarrow.RecordBatch]:
        for some in chunked(results, rows):
            yield arrow.RecordBatch.from_pylist([_row(result) for result in some], schema)

    return arrow.RecordBatchReader.from_batches(schema, batches())


def to_arrow(results: Iterable[Result]) -> pyarrow.Table:
    """All in memory, in the order given."""
    return to_reader(results).read_all()


def to_pandas(results: Iterable[Result]) -> pandas.DataFrame:
    """All in memory, in the order given, with columns of `pandas.ArrowDtype`."""
    frames = _installed("pandas")
    return to_arrow(results).to_pandas(types_mapper=frames.ArrowDtype)


def _installed(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise SettingsError(
            f"tables: {error.name} is not installed; pip install 'lorabatch[tables]'"
        ) from None


def _schema(arrow: Any) -> Any:
    types = {
        "string": arrow.string(),
        "int64": arrow.int64(),
        "list<int32>": arrow.list_(arrow.int32()),
        TIME: arrow.timestamp("us", tz="UTC"),
    }
    return arrow.schema([(name, types[kind]) for name, kind in COLUMNS.items()])


def _row(result: Result) -> dict[str, Any]:
    """Times as the microseconds that they are."""
    error = result.error
    choices = [one.model_dump(mode="json") for one in result.choices or ()]
    return {
        **result.model_dump(exclude={"usage", "error", "choices"}),
        "choices": json.dumps(choices, ensure_ascii=False) if choices else None,
        **result.usage.model_dump(),
        "total_tokens": result.usage.total_tokens,
        "error_code": error.code if error else None,
        "error_message": error.message if error else None,
        "submitted_at": result.submitted_us,
        "started_at": result.started_us,
        "finished_at": result.finished_us,
    }
