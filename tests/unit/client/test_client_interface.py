"""What the package exports, and that both clients have the same methods."""

from __future__ import annotations

import inspect

import lorabatch_producer
from lorabatch_producer import AsyncProducer, Producer


def test_the_package_exports_what_it_says() -> None:
    assert lorabatch_producer.__all__ == ["AsyncProducer", "NotSent", "Producer"]
    assert all(hasattr(lorabatch_producer, name) for name in lorabatch_producer.__all__)


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> set[str]:
        return {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if name[0] != "_"}

    assert methods(AsyncProducer) == methods(Producer) - {"app", "sender"}
