"""`lorabatch serve`: the HTTP API on one process."""

from __future__ import annotations

from typing import Annotated

import typer

from lorabatch import Settings
from lorabatch.database import open_database
from lorabatch.errors import SettingsError
from lorabatch.keys import Keys, keys_wanted
from lorabatch.logs import configure_logging
from lorabatch.urls import is_loopback

__all__ = ["serve"]


def serve(
    host: Annotated[str | None, typer.Option(help="Address; LORABATCH_HTTP_HOST.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; LORABATCH_HTTP_PORT.")] = None,
) -> None:
    """Serve the HTTP API until it is stopped; its documentation is at /docs."""
    given = {"http_host": host, "http_port": port}
    settings = Settings.load(**{k: v for k, v in given.items() if v is not None})
    _closed_to_strangers(settings)
    try:
        from lorabatch_producer.server.serving import serve_forever
    except ImportError as error:
        raise SettingsError(
            f"serve: {error.name} is not installed; pip install 'lorabatch[server]'"
        ) from None
    configure_logging(settings)
    serve_forever(settings)


def _closed_to_strangers(settings: Settings) -> None:
    """Raise SettingsError if others reach it without a key, or nobody has one."""
    if is_loopback(settings.http_host):
        return
    where = f"LORABATCH_HTTP_HOST: {settings.http_host!r} can be reached from other machines"
    if not keys_wanted(settings):
        raise SettingsError(
            f"{where}, and LORABATCH_HTTP_KEYS is 'off': leave that out, or listen on 127.0.0.1, "
            "behind a proxy that asks who it is"
        )
    engine = open_database(settings)
    try:
        usable = Keys(engine).usable()
    finally:
        engine.dispose()
    if not usable:
        raise SettingsError(
            f"{where}, and nobody has a key yet: make one with `lorabatch keys create --tenant T`"
        )
