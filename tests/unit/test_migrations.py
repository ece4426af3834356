"""Migrations build what tables.py says, on both databases, up and down and up again."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from lorabatch import Settings, database
from lorabatch.database import (
    _migrations,
    alembic_config,
    check_schema,
    connect,
    migrate,
    open_database,
    upgrade,
)
from lorabatch.errors import DatabaseNotReady
from lorabatch.ledger import Ledger
from lorabatch.tables import metadata, schema_readers
from tests.later import LATEST, later_config

ROOT = Path(__file__).parents[2]
HEAD = "0009"
SAYING = {f"{n:04}" for n in range(4, int(HEAD) + 1)}  # which code they serve


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'x.db'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def engine(url: str) -> Iterator[sa.Engine]:
    engine = connect(url)
    yield engine
    engine.dispose()


def differences(engine: sa.Engine) -> list[object]:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, metadata))


def tables(engine: sa.Engine) -> set[str]:
    return set(sa.inspect(engine).get_table_names()) - {"alembic_version"}


def checks(engine: sa.Engine) -> set[str | None]:
    inspector = sa.inspect(engine)
    return {c["name"] for t in tables(engine) for c in inspector.get_check_constraints(t)}


def test_upgrading_an_empty_database_makes_the_tables(url: str, engine: sa.Engine) -> None:
    assert upgrade(url) == (None, HEAD)
    assert differences(engine) == []
    assert tables(engine) == set(metadata.tables)
    assert checks(engine) == {"ck_jobs_state"}
    check_schema(engine)
    assert upgrade(url) == (HEAD, HEAD)


def test_down_to_nothing_and_up_again(url: str, engine: sa.Engine) -> None:
    upgrade(url)
    command.downgrade(alembic_config(url), "base")
    assert tables(engine) == set()
    upgrade(url)
    assert differences(engine) == []


def test_a_database_that_is_not_upgraded_is_refused(url: str, engine: sa.Engine) -> None:
    with pytest.raises(DatabaseNotReady, match="at schema none, wanted 0009: run `lorabatch db up"):
        check_schema(engine)


def test_a_newer_schema_that_says_nothing_of_this_version_is_refused(
    url: str, engine: sa.Engine
) -> None:
    upgrade(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    for look in (lambda: check_schema(engine), lambda: upgrade(url)):
        with pytest.raises(DatabaseNotReady, match=f"at schema 9999, .* knows {HEAD}: install"):
            look()


def test_a_newer_schema_that_serves_this_version_is_taken(url: str, engine: sa.Engine) -> None:
    migrate(later_config(url))
    check_schema(engine)
    assert upgrade(url) == (LATEST, LATEST)
    command.downgrade(later_config(url), HEAD)
    assert differences(engine) == []
    assert said(engine).keys() == SAYING


def test_a_newer_schema_that_wants_newer_code_is_refused(url: str, engine: sa.Engine) -> None:
    migrate(later_config(url))
    with engine.begin() as connection:
        connection.execute(sa.update(schema_readers).values(oldest_code="9001"))
    with pytest.raises(DatabaseNotReady, match="at schema 9002, .* from schema 9001 on"):
        check_schema(engine)


def said(engine: sa.Engine) -> dict[str, str]:
    with engine.connect() as connection:
        return {
            row.revision: row.oldest_code for row in connection.execute(schema_readers.select())
        }


def test_revisions_say_which_code_they_serve(engine: sa.Engine, url: str) -> None:
    upgrade(url)
    shown = said(engine)
    assert shown.keys() == SAYING, "oldest_code is missing"
    assert all(shown[revision] <= revision for revision in shown)
    assert [shown[revision] for revision in sorted(shown)] == sorted(shown.values())


def test_a_lock_that_others_hold_is_not_waited_for(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade(postgres_url)
    monkeypatch.setattr(database, "LOCK_PAUSE_S", 0.0)
    monkeypatch.setattr(database, "LOCK_TRIES", 2)
    engine = connect(postgres_url)
    with engine.begin() as connection:
        connection.execute(sa.select(sa.func.count()).select_from(metadata.tables["jobs"]))
        with pytest.raises(DatabaseNotReady, match="not free in 2 tries; end the long transaction"):
            migrate(later_config(postgres_url))
    migrate(later_config(postgres_url))
    check_schema(engine)
    engine.dispose()


def test_an_index_that_was_left_half_made_is_made_anew(postgres_url: str) -> None:
    config = later_config(postgres_url)
    command.upgrade(config, "9001")
    engine = connect(postgres_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE INDEX ix_jobs_remark ON jobs (remark)")
    migrate(config)
    (made,) = [i for i in sa.inspect(engine).get_indexes("jobs") if i["name"] == "ix_jobs_remark"]
    assert made["column_names"] == ["remark", "tenant"]
    engine.dispose()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("no database, but long enough to look like one" * 100)
    with pytest.raises(DatabaseNotReady, match="not a database"):
        upgrade(f"sqlite:///{tmp_path / 'x.db'}")


def test_a_server_that_is_down_is_said_without_its_password(tmp_path: Path) -> None:
    settings = Settings.load(home=tmp_path, database_url="postgresql://u:hunter2@127.0.0.1:1/x")
    with pytest.raises(DatabaseNotReady, match="does not answer") as caught:
        open_database(settings)
    assert "hunter2" not in str(caught.value)


def test_many_processes_may_upgrade_at_once(url: str, engine: sa.Engine, tmp_path: Path) -> None:
    if engine.dialect.name == "sqlite":
        code = f"open_database(Settings.load(home={str(tmp_path / 'home')!r}))"
    else:
        code = f"upgrade({url!r})"
    code = f"from lorabatch import Settings\nfrom lorabatch.database import *\n{code}"
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]


def test_the_migrations_are_found_beside_the_sources_and_shipped_in_the_wheel() -> None:
    assert _migrations() == ROOT / "migrations"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert shipped == {"migrations": "lorabatch/migrations"}


def test_an_installed_package_takes_the_migrations_inside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lorabatch.database

    (tmp_path / "migrations").mkdir()
    monkeypatch.setattr(lorabatch.database, "files", lambda package: tmp_path)
    assert _migrations() == tmp_path / "migrations"


def test_revisions_are_numbered_in_one_line() -> None:
    names = sorted(path.name for path in (ROOT / "migrations" / "versions").glob("*.py"))
    assert [re.match(r"\d{4}_", name) is not None for name in names] == [True] * len(names)
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))


def test_jobs_of_the_version_before_are_kept(url: str, engine: sa.Engine) -> None:
    command.upgrade(alembic_config(url), "0001")
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO jobs (job_id, tenant, adapter_id, idempotency_key, request_hash, body, "
            "submitted_us) VALUES ('j', 't', 'a', 'j', '', '{\"prompt\": \"hello\"}', 1)"
        )
    upgrade(url)
    claim = Ledger(engine).claim(["j"], "w", 9.0)["j"]
    assert claim.job.prompt == "hello"
    assert claim.adapter_versions == {}
