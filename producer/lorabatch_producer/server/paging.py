"""A page of a list as OpenAI has it: the next one begins `after` the last one's id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel

__all__ = ["Page", "page_of"]


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T")
Item = TypeVar("Item", bound=_HasId)


class Page(BaseModel, Generic[T]):
    object: Literal["list"] = "list"
    data: Sequence[T]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page_of(found: Sequence[Item], limit: int) -> Page[Item]:
    """Of what was found when one more than `limit` was looked for."""
    data = found[:limit]
    return Page(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(found) > limit,
    )
