"""Alembic's entry: runs the revisions against the URL it is given, online only."""

from alembic import context

from lorabatch.database import connect
from lorabatch.migrating import alone, note_oldest_code
from lorabatch.tables import metadata


def run() -> None:
    url = context.config.get_main_option("sqlalchemy.url")
    assert url is not None
    engine = connect(url)
    try:
        with engine.connect() as connection, alone(connection):
            context.configure(
                connection=connection,
                target_metadata=metadata,
                render_as_batch=connection.dialect.name == "sqlite",
                compare_type=True,
                transaction_per_migration=True,
                on_version_apply=note_oldest_code,
            )
            with context.begin_transaction():
                context.run_migrations()
    finally:
        engine.dispose()


run()
