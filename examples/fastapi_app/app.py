"""Texts over HTTP from an app of your own: 202 and a place to ask, or the text as it grows."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from lorabatch.errors import InvalidJob, JobNotFound, LoraBatchError, QueueFull
from lorabatch_producer import AsyncProducer, NotSent

TENANT = "shop"  # who asks here; a real app knows it from its session
producer = AsyncProducer()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    yield
    await producer.close()


app = FastAPI(title="texts", lifespan=lifespan)


class Asked(BaseModel):
    prompt: str
    adapter_id: str | None = None
    max_new_tokens: int = 64


@app.post("/texts", status_code=202)
async def ask(asked: Asked, response: Response) -> dict[str, str]:
    job = {
        "messages": [{"role": "user", "content": asked.prompt}],
        "adapter_id": asked.adapter_id,
        "max_new_tokens": asked.max_new_tokens,
    }
    try:
        job_id = await producer.enqueue(job, tenant=TENANT, stream=True)
    except NotSent as error:  # accepted all the same: who asks again would have it twice
        (job_id,) = error.job_ids
    except InvalidJob as error:
        raise HTTPException(422, str(error)) from None
    except QueueFull:
        raise HTTPException(503, "too many texts wait", {"Retry-After": "5"}) from None
    response.headers["Location"] = f"/texts/{job_id}"
    return {"id": job_id}


@app.get("/texts/{job_id}")
async def read(job_id: str, response: Response) -> dict[str, Any]:
    """The text; 202 while there is none yet."""
    try:
        result = await producer.result(job_id)
    except JobNotFound:
        raise HTTPException(404, "no such text") from None
    if result is None:
        response.status_code = 202
        response.headers["Retry-After"] = "1"
        return {"id": job_id, "state": "open"}
    error = result.error.message if result.error else None
    return {"id": job_id, "state": result.state, "text": result.text, "error": error}


@app.get("/texts/{job_id}/events")
async def events(job_id: str) -> StreamingResponse:
    """Server-sent events: pieces of the text, then `end`, or `error`."""
    try:
        await producer.result(job_id)
    except JobNotFound:
        raise HTTPException(404, "no such text") from None
    return StreamingResponse(pieces(job_id), media_type="text/event-stream")


async def pieces(job_id: str) -> AsyncIterator[str]:
    try:
        async for piece in producer.stream(job_id):
            yield event("text", piece)
        yield event("end", job_id)
    except LoraBatchError as error:
        yield event("error", str(error))


def event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
