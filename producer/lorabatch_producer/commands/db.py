"""`lorabatch db upgrade` and `db check`: the schema of the ledger's database."""

from __future__ import annotations

import typer

from lorabatch import Settings
from lorabatch.database import check_schema, connect
from lorabatch.database import upgrade as upgrade_database
from lorabatch_producer.services import masked

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="The ledger's database.")


@app.command()
def upgrade() -> None:
    """Bring the schema to this version, while workers go on; safe to run again."""
    settings = Settings.load()
    url = settings.resolved_database_url
    if settings.embedded_database:
        settings.home.mkdir(parents=True, exist_ok=True)
    before, after = upgrade_database(url)
    change = f"at {after} already" if before == after else f"{before or 'empty'} -> {after}"
    typer.echo(f"{masked(url)}: {change}")


@app.command()
def check() -> None:
    """Say whether the schema serves this version; exit code 2 if not."""
    engine = connect(Settings.load().resolved_database_url)
    try:
        check_schema(engine)
    finally:
        engine.dispose()
    typer.echo(f"{engine.url!r}: its schema serves this version")
