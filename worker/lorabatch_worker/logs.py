"""The worker's log: `lorabatch.logs`, and Celery kept from setting up its own."""

from __future__ import annotations

from typing import Any

from celery import signals

from lorabatch.logs import configure_logging
from lorabatch.settings import Settings

__all__ = ["own_logging"]


def own_logging(settings: Settings) -> None:
    """Log like this, and keep Celery from setting up its own."""
    configure_logging(settings)

    def keep(**_: Any) -> None:
        """A receiver is all that Celery asks for."""

    signals.setup_logging.connect(keep, weak=False, dispatch_uid="lorabatch")
