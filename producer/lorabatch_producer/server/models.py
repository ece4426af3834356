"""Which models a caller may name: the base models of the queues, and adapters.

A base model's name picks its queue, the settings' own before others. An adapter goes to the queue
whose base model it was registered for, else to the settings' own. A tenant sees its own adapters,
the shared ones and those that the server is configured with or has in its data folder; anything
else is unknown, before it is accepted. Raises UnknownAdapter; database errors pass through.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import sqlalchemy as sa

from lorabatch import Settings
from lorabatch.errors import UnknownAdapter, shown
from lorabatch.fields import ADAPTER_PATTERN
from lorabatch.location import public_name
from lorabatch.queues import Queues
from lorabatch.registry import SHARED, Registered, Registry
from lorabatch_producer.bulk import base_names

__all__ = ["Model", "Models"]

OURS = "lorabatch"


@dataclass(frozen=True)
class Model:
    """What a name stands for. `base_model`: its name without a folder; created: s since 1970, 0
    if it is not known."""

    name: str
    base_model: str
    queue: str
    adapter_id: str | None = None
    owner: str = OURS
    created_s: int = 0


class _Bases(NamedTuple):
    own: Model
    by_name: dict[str, Model]


class Models:
    """Looked up anew each time."""

    def __init__(self, engine: sa.Engine, settings: Settings) -> None:
        self._queues = Queues(engine)
        self._registry = Registry(engine)
        self._settings = settings

    def base(self) -> Model:
        """Of the settings' own queue."""
        return self._bases().own

    def find(self, tenant: str, name: object, field: str = "model") -> Model:
        """What a request's field means to this tenant."""
        bases = self._bases()
        if isinstance(name, str) and name in bases.by_name:
            return bases.by_name[name]
        if isinstance(name, str) and len(name) <= 128 and re.fullmatch(ADAPTER_PATTERN, name):
            entry = self._registry.find(tenant, name)
            if entry is not None:
                return _adapter(entry, bases)
            if name in self._settings.configured_adapters:
                return replace(bases.own, name=name, adapter_id=name)
        raise UnknownAdapter(
            f"{field}: wanted the base model's name or an adapter's id (got {shown(name)}); "
            "GET /v1/models lists both"
        )

    def names(self, tenant: str) -> list[Model]:
        """All that this tenant may name, each once: base models first."""
        bases = self._bases()
        found = {model.name: model for model in bases.by_name.values()}
        for entry in self._registry.names(tenant):
            found.setdefault(entry.adapter_id, _adapter(entry, bases))
        for name in self._settings.configured_adapters:
            found.setdefault(name, replace(bases.own, name=name, adapter_id=name))
        return list(found.values())

    def _bases(self) -> _Bases:
        """By all names that base models may be called, the settings' own queue first."""
        theirs = self._queues.list()
        mine = self._settings.queue
        own = _base(theirs.get(mine, self._settings.base_model), mine)
        by_name: dict[str, Model] = {}
        for queue in [mine, *(queue for queue in theirs if queue != mine)]:
            full = theirs.get(queue, self._settings.base_model)
            for name in sorted(base_names(self._settings, full)):
                by_name.setdefault(name, _base(full, queue))
        return _Bases(own, by_name)


def _base(full: str, queue: str) -> Model:
    name = public_name(full)
    return Model(name, name, queue)


def _adapter(entry: Registered, bases: _Bases) -> Model:
    base = bases.by_name.get(entry.base_model or "", bases.own)
    return replace(
        base,
        name=entry.adapter_id,
        adapter_id=entry.adapter_id,
        owner=OURS if entry.tenant == SHARED else entry.tenant,
        created_s=entry.created_us // 1_000_000,
    )
