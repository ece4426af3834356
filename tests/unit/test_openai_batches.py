"""Which server works on a batch: one at a time, and another once the first is silent."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa

from lorabatch.files import Files, new_file_id
from lorabatch.openai_batches import OpenAIBatches
from lorabatch.tables import files


@pytest.fixture
def batches(database: sa.Engine) -> OpenAIBatches:
    return OpenAIBatches(database)


def add(database: sa.Engine, tenant: str = "acme", purpose: str = "batch") -> Any:
    file = Files(database).add(new_file_id(), tenant, purpose, "in.jsonl", 1)
    return OpenAIBatches(database).add(
        *("acme", file.file_id, 3600.0),
        queue="lorabatch",
        base_names=["tiny"],
        endpoint="/v1/completions",
        completion_window="24h",
    )


def test_each_is_taken_once(database: sa.Engine, batches: OpenAIBatches) -> None:
    made = {add(database).batch_id for _ in range(20)}

    def take_all(_: int) -> list[str]:
        taken = []
        while (row := batches.take(60.0)) is not None and len(taken) < 40:
            taken.append(row.batch_id)
        return taken

    with ThreadPoolExecutor(4) as threads:
        taken = [batch_id for some in threads.map(take_all, range(4)) for batch_id in some]
    # A thread may find nothing while others hold the rows that it looked at.
    while (row := batches.take(60.0)) is not None and len(taken) < 40:
        taken.append(row.batch_id)
    assert sorted(taken) == sorted(made)


def test_whoever_was_silent_writes_no_more(database: sa.Engine, batches: OpenAIBatches) -> None:
    add(database)
    first = batches.take(0.0)
    second = batches.take(60.0)
    assert (first.batch_id, batches.take(60.0)) == (second.batch_id, None)
    file = {"tenant": "acme", "purpose": "batch_output", "filename": "x", "bytes": 1}
    for value in ({"status": "in_progress"}, {"total": 5}):
        assert batches.change(first, value, [{**file, "file_id": "file-1"}]) is None
    assert batches.keep(first, 60.0) is None
    batches.give_back(first, 0.0)
    assert batches.take(60.0) is None
    changed = batches.change(second, {"status": "in_progress", "total": 5})
    assert (changed.status, changed.total) == ("in_progress", 5)
    assert changed.in_progress_us >= changed.created_us
    with database.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(files)) == 1


def test_a_status_that_was_changed_meanwhile_stands(
    database: sa.Engine, batches: OpenAIBatches
) -> None:
    add(database)
    held = batches.take(60.0)
    assert batches.cancel(held.batch_id)
    assert batches.change(held, {"status": "in_progress"}) is None
    kept = batches.keep(held, 60.0)
    assert kept is not None
    assert kept.status == "cancelling"
    batches.give_back(held, 0.0)
    again = batches.take(60.0)
    assert batches.change(again, {"status": "cancelled"}).status == "cancelled"
    batches.give_back(again, 0.0)
    assert batches.take(60.0) is None
    assert not batches.cancel(held.batch_id)


def test_what_is_given_back_comes_again_in_its_time(
    database: sa.Engine, batches: OpenAIBatches
) -> None:
    add(database)
    batches.give_back(batches.take(60.0), 60.0)
    assert batches.take(60.0) is None
    row = batches.list("acme", 1)[0]
    assert batches.cancel(row.batch_id)  # which makes it due at once
    assert batches.take(60.0) is not None


def test_only_ones_own_file_for_batches_becomes_one(database: sa.Engine) -> None:
    assert add(database, tenant="other") is None
    assert add(database, purpose="batch_output") is None
    assert add(database) is not None


def test_what_is_due_is_found_by_its_index(database: sa.Engine, batches: OpenAIBatches) -> None:
    """The partial one, for which the query must have its very words."""
    add(database)
    seen: list[str] = []
    sa.event.listen(database, "before_cursor_execute", lambda *call: seen.append(call[2]))
    batches.take(60.0)
    with database.connect() as connection:
        condition = "status IN ('validating', 'in_progress', 'finalizing', 'cancelling')"
        assert any(condition in statement for statement in seen)
        indexes = sa.inspect(connection).get_indexes("openai_batches")
    (due,) = [index for index in indexes if index["name"] == "ix_openai_batches_due"]
    assert due["column_names"] == ["due_us"]
