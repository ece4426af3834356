"""`lorabatch adapters add|list|show|remove|pin|retry|prune` on a real database and real files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorabatch import Job, Settings
from lorabatch.database import open_database
from lorabatch.ledger import Ledger
from lorabatch.registry import Registry
from tests.command_line import Cli

Run = Callable[..., str]


@pytest.fixture
def run(cli: Cli, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`lorabatch adapters` on the tiny base model: stdout."""
    monkeypatch.setenv("LORABATCH_BASE_MODEL", str(tiny_folder))
    monkeypatch.setenv("LORABATCH_BASE_MODEL_ALIASES", "acme/tiny")
    monkeypatch.setenv("LORABATCH_DTYPE", "float32")
    return lambda *given, code=0: cli("adapters", *given, code=code).stdout


@pytest.fixture
def mine(tiny_adapters: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of an adapter, to be changed."""
    return Path(shutil.copytree(tiny_adapters["attention"], tmp_path / "mine"))


def listed(run: Run, *given: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in run(*given, "--json").splitlines()]


def test_what_is_added_is_listed_and_its_files_are_kept(
    run: Run, mine: Path, settings: Settings
) -> None:
    said = run("add", "sql", mine)
    assert said.startswith("registered: sql for everybody: adapter 'sql'; 2 q_proj, 2 v_proj")
    (entry,) = listed(run, "list")
    assert (entry["adapter_id"], entry["tenant"], entry["rank"]) == ("sql", "", 1)
    shutil.rmtree(mine)
    kept = Path(str(entry["location"]))
    assert kept == settings.adapter_store_folder / str(entry["version"])
    assert (kept / "adapter_config.json").is_file()
    assert str(entry["version"])[:12] in run("list")


def test_a_folder_needs_no_dot_before_it(
    run: Run, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(mine, mine.parent / "some" / "where" / "sql", dirs_exist_ok=True)
    monkeypatch.chdir(mine.parent)
    assert run("add", "sql", "some/where/sql").startswith("registered: sql")


def test_another_version_under_the_same_name(run: Run, mine: Path) -> None:
    run("add", "sql", mine)
    assert run("add", "sql", mine).startswith("registered already: sql")
    (mine / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert run("add", "sql", mine).startswith("registered: sql")
    versions = listed(run, "show", "sql")
    assert [v["current"] for v in versions] == [True, False]
    assert len({v["location"] for v in versions}) == 2
    assert "superseded" in run("show", "sql")
    assert len(listed(run, "list")) == 1


def test_a_tenant_s_own(run: Run, mine: Path) -> None:
    run("add", "sql", mine, "--tenant", "acme")
    assert listed(run, "list", "--tenant", "umbrella") == []
    assert [e["tenant"] for e in listed(run, "list", "--tenant", "acme")] == ["acme"]
    run("show", "sql", code=2)
    run("remove", "sql", code=2)
    assert run("remove", "sql", "--tenant", "acme").startswith("removed: sql for acme, 1 versions")


def test_what_a_worker_would_refuse_is_not_registered(
    run: Run, mine: Path, settings: Settings
) -> None:
    config = json.loads((mine / "adapter_config.json").read_text())
    (mine / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    assert run("add", "sql", mine, code=1).startswith("refused: adapter 'sql': ")
    assert listed(run, "list") == []
    assert not settings.adapter_store_folder.exists()
    assert "version" in run("add", "sql", mine, "--unchecked")


@pytest.mark.parametrize(
    ("name", "source", "code"),
    [
        ("a/b/c", "HERE", 2),
        ("merged/a", "HERE", 2),
        ("../a", "HERE", 2),
        ("a", "ftp://x/y", 2),
        ("a", "nothing", 2),
        ("a", "/nowhere", 2),
    ],
)
def test_names_and_places_that_cannot_be(
    run: Run, cli: Cli, mine: Path, name: str, source: str, code: int
) -> None:
    place = str(mine) if source == "HERE" else source
    done = cli("adapters", "add", name, place, code=code)
    assert done.stderr.startswith("lorabatch: ")
    assert "Traceback" not in done.stderr
    assert listed(run, "list") == []


def test_outside_of_the_roots(
    run: Run, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "allowed").mkdir()
    monkeypatch.setenv("LORABATCH_ADAPTER_ROOTS", str(tmp_path / "allowed"))
    assert "refused: " in run("add", "sql", mine, code=1)
    shutil.move(mine, tmp_path / "allowed" / "sql")
    assert run("add", "sql", tmp_path / "allowed" / "sql").startswith("registered")


def test_removed_files_stay_as_long_as_a_job_needs_them(
    run: Run, mine: Path, settings: Settings
) -> None:
    run("add", "sql", mine)
    (entry,) = listed(run, "list")
    kept = Path(str(entry["location"]))
    engine = open_database(settings)
    ledger = Ledger(engine)
    job = Job(prompt="hi", adapter_id="sql")
    ledger.accept([job])
    assert "0 versions deleted; 1 open jobs still run with it" in run("remove", "sql")
    assert run("prune") == "deleted: 0 versions\n"
    assert kept.is_dir()
    ledger.cancel([job.job_id])
    engine.dispose()
    assert run("prune") == "deleted: 1 versions\n"
    assert not kept.exists()


def test_the_same_files_under_another_name_stay(run: Run, mine: Path) -> None:
    run("add", "one", mine)
    run("add", "two", mine)
    run("remove", "one")
    (entry,) = listed(run, "list")
    assert Path(str(entry["location"])).is_dir()


def test_pins_and_what_was_set_aside(run: Run, mine: Path, settings: Settings) -> None:
    run("add", "sql", mine)
    run("pin", "sql")
    assert "pinned" in run("list")
    run("unpin", "sql")
    engine = open_database(settings)
    (entry,) = Registry(engine).names()
    Registry(engine, os.environ["LORABATCH_BASE_MODEL"]).set_aside(
        entry.key, "invalid_adapter", "adapter 'sql': NaN"
    )
    engine.dispose()
    assert "set aside until" in run("list")
    assert "failed 1 times: adapter 'sql': NaN" in run("show", "sql")
    assert run("retry", "sql") == "to be tried again: 1 versions of sql\n"
    assert "ok" in run("list")


def test_no_worker_to_warm(run: Run, mine: Path) -> None:
    run("add", "sql", mine)
    assert "no worker answers" in run("warm", "sql", code=1)
