"""OpenAI's usage of completions, of the caller's tenant: what it is billed for.

A project is a tenant. What cannot be told apart, users, keys and service tiers, is refused by name.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from lorabatch.errors import shown
from lorabatch.location import public_name
from lorabatch_producer.server.caller import Caller, needs
from lorabatch_producer.server.desk import Desk, desk_of
from lorabatch_producer.usage_buckets import Kind, Used, edges, usage_buckets

__all__ = ["router"]

router = APIRouter(prefix="/v1/organization/usage", tags=["openai"])
WIDTHS = {"1m": (60, 60, 1440), "1h": (3600, 24, 168), "1d": (86_400, 7, 31)}  # s, default, most
LAST_S = 253_402_300_800  # the year 10000
PAGE = "page_"

TheDesk = Annotated[Desk, Depends(desk_of)]
User = Annotated[Caller, Depends(needs("usage"))]
Seconds = Annotated[int, Field(ge=0, lt=LAST_S)]
Group = Literal["project_id", "model", "batch"]


class Asked(BaseModel):
    """Lists may be repeated with or without brackets, as clients do."""

    model_config = ConfigDict(extra="forbid")

    start_time: Seconds
    end_time: Seconds | None = None
    bucket_width: Literal["1m", "1h", "1d"] = "1d"
    limit: Annotated[int, Field(ge=1, le=1440)] | None = None
    page: str | None = None
    batch: bool | None = None
    group_by: list[Group] = []
    group_by_too: list[Group] = Field(default=[], alias="group_by[]")
    models: list[str] = []
    models_too: list[str] = Field(default=[], alias="models[]")
    project_ids: list[str] = []
    project_ids_too: list[str] = Field(default=[], alias="project_ids[]")


class UsageResult(BaseModel):
    object: Literal["organization.usage.completions.result"] = (
        "organization.usage.completions.result"
    )
    input_tokens: int
    output_tokens: int
    input_cached_tokens: int
    num_model_requests: int
    project_id: str | None = None
    model: str | None = None
    batch: bool | None = None
    user_id: None = None
    api_key_id: None = None
    service_tier: None = None


class UsageBucket(BaseModel):
    """Times: seconds UTC; the end is not in it."""

    object: Literal["bucket"] = "bucket"
    start_time: int
    end_time: int
    results: list[UsageResult]


class UsagePage(BaseModel):
    object: Literal["page"] = "page"
    data: list[UsageBucket]
    has_more: bool
    next_page: str | None


@router.get("/completions")
async def completions(desk: TheDesk, caller: User, asked: Annotated[Asked, Query()]) -> UsagePage:
    """Tokens and requests of jobs that succeeded, by the time when they ended."""
    width_s, few, most = WIDTHS[asked.bucket_width]
    limit = asked.limit or few
    if limit > most:
        raise HTTPException(400, f"limit: wanted {most} at most with {asked.bucket_width} buckets")
    start_s = _start_s(asked)
    end_s = int(time.time()) + 1 if asked.end_time is None else asked.end_time  # with this second
    if start_s >= end_s:
        raise HTTPException(400, f"start_time: {start_s} is not before end_time, {end_s}")
    at = edges(start_s, end_s, width_s, limit)
    engine = desk.ledger.engine
    found = await desk.call(usage_buckets, engine, caller.tenant, at, width_s)
    data = [
        UsageBucket(start_time=first, end_time=last, results=_results(asked, caller.tenant, used))
        for (first, last), used in zip(pairwise(at), found, strict=True)
    ]
    more = at[-1] < end_s
    return UsagePage(data=data, has_more=more, next_page=f"{PAGE}{at[-1]}" if more else None)


def _start_s(asked: Asked) -> int:
    if asked.page is None:
        return asked.start_time
    text = asked.page.removeprefix(PAGE)
    digits = text.isascii() and text.isdigit() and len(text) < 13
    if not digits or not asked.start_time <= int(text) < LAST_S:
        raise HTTPException(400, f"page: wanted next_page of an answer (got {shown(asked.page)})")
    return int(text)


def _results(asked: Asked, tenant: str, used: Mapping[Kind, Used]) -> list[UsageResult]:
    groups = {*asked.group_by, *asked.group_by_too}
    models = {*asked.models, *asked.models_too}
    projects = {*asked.project_ids, *asked.project_ids_too}
    sums: dict[tuple[str | None, bool | None], Used] = defaultdict(Used)
    for kind, more in used.items():
        model = kind.adapter_id or (kind.base_model and public_name(kind.base_model))
        wanted = asked.batch in (None, kind.batch) and (not models or model in models)
        if wanted and (not projects or tenant in projects):
            group = model if "model" in groups else None, kind.batch if "batch" in groups else None
            sums[group] += more
    return [
        UsageResult(
            input_tokens=one.input_tokens,
            output_tokens=one.output_tokens,
            input_cached_tokens=one.cached_tokens,
            num_model_requests=one.requests,
            project_id=tenant if "project_id" in groups else None,
            model=model,
            batch=batch,
        )
        for (model, batch), one in sorted(sums.items(), key=lambda item: str(item[0]))
    ]
