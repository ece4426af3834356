"""Logs of workers and servers: ours and others' as lines on stderr, for people or as JSON.

Never prompts: Celery's loggers that print messages' bodies are kept at warning.
"""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Any

import structlog

from lorabatch.settings import Settings

__all__ = ["configure_logging", "trace"]

QUIET = ("celery.worker.strategy", "celery.app.trace", "celery.pool", "kombu", "alembic")


def configure_logging(settings: Settings) -> None:
    """Set up the root logger and structlog; again with other settings is fine."""
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    render: list[Any] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    if settings.log_format == "console":
        plain = structlog.dev.plain_traceback  # the default one shows locals: prompts
        render = [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)
        ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *render,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def trace(error: BaseException) -> str:
    """A traceback for a log, without the locals that structlog shows by itself: prompts."""
    return "".join(traceback.format_exception(error))
