"""Whether the server is there, and whether what it needs is."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from lorabatch_producer.server.desk import Desk, desk_of

__all__ = ["router"]

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Whether the process answers")
async def alive() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz", summary="Whether jobs can be accepted")
async def ready(desk: Annotated[Desk, Depends(desk_of)]) -> dict[str, str]:
    """The database answers too; jobs can be accepted. 503 otherwise."""
    await desk.check()
    return {"status": "ok"}
