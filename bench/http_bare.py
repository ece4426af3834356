"""What `bench.http` compares with: the least that FastAPI and SQLAlchemy can do, a row a request.

uvicorn bench.http_bare:app      # BENCH_DATABASE: an upgraded ledger's URL
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import sqlalchemy as sa
from fastapi import FastAPI

from lorabatch.database import connect

metadata = sa.MetaData()
rows = sa.Table(
    "bench_rows",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("body", sa.JSON),
)
engine = connect(os.environ["BENCH_DATABASE"])


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    metadata.create_all(engine)
    yield
    engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.post("/jobs", status_code=202)
def insert(body: dict[str, Any]) -> dict[str, str]:
    """In a thread of FastAPI's, as its documentation has it."""
    row = {"id": str(uuid.uuid4()), "body": body}
    with engine.begin() as connection:
        connection.execute(rows.insert(), [row])
    return {"job_id": row["id"], "state": "queued"}
