"""`lorabatch serve`: the HTTP API on one process."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated

import typer

from lorabatch import Settings
from lorabatch.errors import SettingsError

__all__ = ["serve"]


def serve(
    host: Annotated[str | None, typer.Option(help="Address; LORABATCH_HTTP_HOST.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; LORABATCH_HTTP_PORT.")] = None,
) -> None:
    """Serve the HTTP API until it is stopped; its documentation is at /docs."""
    given = {"http_host": host, "http_port": port}
    settings = Settings.load(**{k: v for k, v in given.items() if v is not None})
    if not _loopback(settings.http_host):
        raise SettingsError(
            f"LORABATCH_HTTP_HOST: {settings.http_host!r} can be reached from other machines, and "
            "this version knows no keys: listen on 127.0.0.1, behind a proxy that asks who it is"
        )
    try:
        import uvicorn

        from lorabatch_producer.server import create_app
    except ImportError as error:
        raise SettingsError(
            f"serve: {error.name} is not installed; pip install 'lorabatch[server]'"
        ) from None
    config = uvicorn.Config(
        create_app(settings),
        host=settings.http_host,
        port=settings.http_port,
        log_level=settings.log_level,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )
    uvicorn.Server(config).run()


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
