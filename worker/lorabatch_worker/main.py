"""`lorabatch-worker`: run a worker until it is told to stop.

Options override LORABATCH_* variables and the settings file. Exit codes: 0 after SIGTERM, 2
with one line on stderr when settings, database, broker, model or adapters are not usable, 3 when
the device is lost or hangs: its jobs were handed back, and a supervisor has to start another.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from lorabatch.errors import LoraBatchError
from lorabatch.settings import Settings
from lorabatch_worker.app import make_worker_app
from lorabatch_worker.logs import own_logging
from lorabatch_worker.pool import EXIT_BROKEN, EXIT_NOT_READY
from lorabatch_worker.service import DRAIN

__all__ = ["main", "run_worker"]

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@cli.command()
def worker(
    home: Annotated[Path | None, typer.Option(help="data folder")] = None,
    base_model: Annotated[str | None, typer.Option(help="folder, or Hub id[@rev]")] = None,
    adapters: Annotated[str | None, typer.Option(help="id, id@rev, name=path, ...")] = None,
    broker_url: Annotated[str | None, typer.Option(help="redis:// URL")] = None,
    database_url: Annotated[str | None, typer.Option(help="SQLAlchemy URL")] = None,
    queues: Annotated[str | None, typer.Option(help="comma list of queues to drain")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N, cuda:any")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16")] = None,
    max_seqs: Annotated[int | None, typer.Option(help="sequences that run at once")] = None,
    adapter_slots: Annotated[int | None, typer.Option(help="adapters on the device")] = None,
    drain_s: Annotated[float | None, typer.Option(help="SIGTERM: time for running jobs")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning, error")] = None,
    log_format: Annotated[str | None, typer.Option(help="console or json")] = None,
) -> None:
    """Drain the queue: claim jobs, generate, record. SIGTERM lets running jobs finish."""
    given = {
        "home": home,
        "base_model": base_model,
        "adapters": adapters,
        "broker_url": broker_url,
        "database_url": database_url,
        "consume": queues,
        "device": device,
        "dtype": dtype,
        "max_seqs": max_seqs,
        "adapter_slots": adapter_slots,
        "drain_s": drain_s,
        "log_level": log_level,
        "log_format": log_format,
    }
    try:
        settings = Settings.load(**{name: v for name, v in given.items() if v is not None})
        own_logging(settings)
        app = make_worker_app(settings)
    except LoraBatchError as error:
        typer.echo(f"lorabatch-worker: {error}", err=True)
        raise typer.Exit(EXIT_NOT_READY) from None
    raise typer.Exit(run_worker(app, settings))


def run_worker(app: Any, settings: Settings, **options: Any) -> int:
    """Run until a signal: the exit code. `options` are those of Celery's worker."""
    controller = app.Worker(
        hostname=f"lorabatch-{os.getpid()}@{socket.gethostname()}",
        loglevel=settings.log_level,
        quiet=True,
        without_gossip=True,
        **options,
    )
    controller.start()
    code = int(controller.exitcode or 0)
    hangs = any(thread.name == DRAIN for thread in threading.enumerate())
    if hangs or code == EXIT_BROKEN:
        logging.shutdown()
        os._exit(code)  # what hangs in the device would keep the interpreter from ending
    return code


def main() -> None:
    cli()
