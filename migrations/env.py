"""Alembic's entry: runs the revisions against the URL it is given, online only."""

from alembic import context

from lorabatch.database import connect
from lorabatch.tables import metadata


def run() -> None:
    given = context.config.attributes.get("connection")
    if given is not None:
        migrate(given)
        return
    url = context.config.get_main_option("sqlalchemy.url")
    assert url is not None
    engine = connect(url)
    with engine.connect() as connection:
        migrate(connection)
    engine.dispose()


def migrate(connection) -> None:
    sqlite = connection.dialect.name == "sqlite"
    context.configure(
        connection=connection, target_metadata=metadata, render_as_batch=sqlite, compare_type=True
    )
    with context.begin_transaction():
        if not sqlite:
            # one upgrade at a time, however many processes start one
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(5174237)")
        context.run_migrations()


run()
