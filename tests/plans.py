"""How SQLite goes about the questions that a call asks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

__all__ = ["explained"]


def explained(engine: sa.Engine, call: Callable[[], object]) -> list[str]:
    """The plans of all SELECTs on jobs that the call makes, in order."""
    asked: list[tuple[str, Any]] = []

    def note(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        if statement.startswith("SELECT") and "FROM jobs" in statement:
            asked.append((statement, parameters))

    sa.event.listen(engine, "before_cursor_execute", note)
    call()
    sa.event.remove(engine, "before_cursor_execute", note)
    with engine.connect() as connection:
        return [
            str(list(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {question}", parameters)))
            for question, parameters in asked
        ]
