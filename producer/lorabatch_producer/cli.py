"""The command line `lorabatch`: its groups, and how every error of ours becomes one line.

Exit codes: 0 well; 1 done, but lines were bad, jobs failed, the audit found differences or the
doctor found something missing; 2 refused, with one line on stderr; 130 interrupted.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import Any

import redis
import sqlalchemy as sa
import typer
from typer.core import TyperGroup

import lorabatch
from lorabatch.errors import LoraBatchError
from lorabatch_producer.commands import (
    bakeoff,
    batch,
    db,
    dead,
    doctor,
    jobs,
    keys,
    queues,
    report,
    serve,
    server,
    tenants,
    webhooks,
    why,
)
from lorabatch_producer.console import printable

__all__ = ["app", "main"]


class _OneLineErrors(TyperGroup):
    """Commands whose known errors end as one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LoraBatchError as error:
            text, code = str(error), 2
        except sa.exc.DBAPIError as error:
            reason = str(error.orig).strip().partition("\n")[0]
            text, code = f"the database refused: {reason}", 2
        except redis.RedisError as error:
            text, code = f"the broker refused: {error}", 2
        except OSError as error:
            text, code = f"{error.filename or 'system'}: {error.strerror or error}", 2
        except UnicodeEncodeError as error:  # bytes of the command line that are no text
            text, code = f"{error.object[:80]!r} is not valid Unicode; write it in UTF-8", 2
        except KeyboardInterrupt:
            text, code = "interrupted; jobs that were accepted go on: see `lorabatch status`", 130
        typer.secho(f"lorabatch: {printable(text)}", err=True, fg="red" if code == 2 else None)
        raise typer.Exit(code)


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Batch text generation with one base model and any number of LoRA adapters.",
)
app.command("enqueue")(jobs.enqueue)
app.command("result")(jobs.result)
app.command("cancel")(jobs.cancel)
app.command("status")(server.status)
app.command("why")(why.why)
app.command("stop")(server.stop)
app.command("serve")(serve.serve)
app.command("settings")(server.settings)
app.command("doctor")(doctor.doctor)
app.command("bakeoff")(bakeoff.bakeoff)
app.add_typer(batch.app, name="batch")
app.add_typer(dead.app, name="dead")
app.add_typer(tenants.app, name="tenants")
app.add_typer(keys.app, name="keys")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(queues.app, name="queues")
app.add_typer(report.app, name="report")
app.add_typer(db.app, name="db")
for command in entry_points(group="lorabatch.commands"):  # of packages that are not the producer's
    app.add_typer(command.load(), name=command.name)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorabatch {lorabatch.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    pass


def main() -> None:
    """The console script."""
    try:
        app(prog_name="lorabatch")
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    main()
