"""Which folder a name stands for: configured, in the data folder, on the Hub, or nowhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorabatch import Settings
from lorabatch.database import connect, open_database
from lorabatch.errors import AdapterUnavailable, InvalidAdapter, UnknownAdapter
from lorabatch.registry import Registered, Registry
from lorabatch_worker.adapters import attempts
from lorabatch_worker.adapters.catalog import AdapterCatalog
from lorabatch_worker.adapters.wanted import Wanted
from lorabatch_worker.adapters.weights import read_adapter, version_of
from lorabatch_worker.retry import Stopped
from tests.bad_adapters import TARGET, write
from tests.hub_server import OLD, HubServer


def catalog(home: Path, adapters: str = "", registry: Registry | None = None) -> AdapterCatalog:
    return AdapterCatalog(Settings.load(home=home, adapters=adapters), registry)


def where(
    found: AdapterCatalog, name: str, tenant: str = "default", version: str | None = None
) -> Path:
    with found.hold(found.find(Wanted(tenant, name, version))) as folder:
        return folder


# -- folders ------------------------------------------------------------------


def test_a_configured_folder_is_found(home: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "a")
    found = catalog(home, f"acme/sql={tmp_path}/elsewhere/a")
    assert where(found, "acme/sql") == tmp_path / "elsewhere" / "a"
    assert found.configured() == ["acme/sql"]


def test_a_relative_folder_is_that_of_the_start(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "mine" / "sql")
    monkeypatch.chdir(tmp_path)
    found = catalog(home, "sql=mine/sql")
    monkeypatch.chdir("/")
    assert where(found, "sql") == tmp_path / "mine" / "sql"


def test_folders_in_the_data_folder_need_no_configuration(home: Path) -> None:
    found = catalog(home)
    assert found.configured() == []
    write(home / "adapters" / "b")
    (home / "adapters" / "not-an-adapter").mkdir()
    assert found.configured() == ["b"]
    assert where(found, "b") == home / "adapters" / "b"


def test_a_configured_name_goes_before_the_data_folder(home: Path, tmp_path: Path) -> None:
    write(home / "adapters" / "a")
    write(tmp_path / "other")
    assert where(catalog(home, f"a={tmp_path}/other"), "a") == tmp_path / "other"


@pytest.mark.parametrize(
    "name",
    ["nobody", "../outside", "..", ".", "", "b/../b", "sub/inner", "a/b/c", "link", "b ", "B\n"],
)
def test_anything_else_is_unknown(name: str, home: Path) -> None:
    write(home / "outside")
    write(home / "adapters" / "b")
    write(home / "adapters" / "sub" / "inner")
    (home / "adapters" / "link").symlink_to(home / "outside")
    with pytest.raises(UnknownAdapter) as caught:
        where(catalog(home), name)
    assert f"adapter {name!r}" in str(caught.value)
    assert "b" in str(caught.value)
    assert str(home) not in str(caught.value)


def test_an_absolute_path_is_unknown(home: Path) -> None:
    write(home / "outside")
    with pytest.raises(UnknownAdapter):
        where(catalog(home), str(home / "outside"))


@pytest.mark.parametrize("relative", [False, True])
def test_a_folder_that_went_away_is_unavailable_and_never_looked_for_elsewhere(
    relative: bool, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "mine" / "sql")
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append(a))
    found = catalog(home, "sql=mine/sql" if relative else f"sql={tmp_path}/mine/sql")
    os.rename(tmp_path / "mine", tmp_path / "moved")
    with pytest.raises(AdapterUnavailable, match=r"'sql': its folder is not there.*ADAPTERS"):
        where(found, "sql")
    assert not asked


# -- the Hub ------------------------------------------------------------------


def scale_of(folder: Path) -> float:
    return next(iter(read_adapter("x", folder, TARGET).sites.values())).scale


def test_a_revision_is_what_it_was_when_it_was_first_fetched(hub: HubServer, home: Path) -> None:
    found = catalog(home, f"old=acme/sql@{OLD},new=acme/sql,tagged=acme/sql@v1")
    assert scale_of(where(found, "old")) == scale_of(where(found, "tagged")) == 1.0
    assert scale_of(where(found, "new")) == 2.0
    assert where(found, "old") == where(found, "tagged")


def test_once_fetched_it_needs_no_hub(hub: HubServer, home: Path) -> None:
    found = catalog(home, "acme/sql@v1")
    first = where(found, "acme/sql")
    hub.close()
    assert where(found, "acme/sql") == first


def test_after_a_restart_what_came_last_is_used_while_the_hub_is_away(
    hub: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = where(catalog(home, "acme/sql"), "acme/sql")
    hub.statuses = [503] * 100
    monkeypatch.setattr(attempts, "FIRST_DELAY_S", 0.01)
    assert where(catalog(home, "acme/sql"), "acme/sql") == first
    with pytest.raises(AdapterUnavailable):
        where(catalog(home, "acme/sql@v1"), "acme/sql")


def test_configured_folders_lie_in_the_roots(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "mine")
    write(home / "adapters" / "dropped")
    monkeypatch.setenv("LORABATCH_ADAPTER_ROOTS", str(tmp_path / "allowed"))
    found = catalog(home, f"a={tmp_path}/mine")
    assert where(found, "dropped") == home / "adapters" / "dropped"
    with pytest.raises(InvalidAdapter, match="adapter 'a': .*outside LORABATCH_ADAPTER_ROOTS"):
        where(found, "a")


@pytest.mark.parametrize("entry", ["x=acme/nothing", "x=acme/sql@v9"])
def test_what_the_hub_does_not_have_is_unknown(hub: HubServer, home: Path, entry: str) -> None:
    with pytest.raises(UnknownAdapter, match=r"adapter 'x': there is no adapter that") as caught:
        where(catalog(home, entry), "x")
    assert entry[2:] not in str(caught.value), "where it is looked for is the log's"


def test_a_worker_that_stops_fails_nobody_for_it(hub: HubServer, home: Path) -> None:
    hub.hang.clear()
    found = catalog(home, "acme/sql")
    found.close()
    with pytest.raises(Stopped):
        where(found, "acme/sql")


# -- registered ---------------------------------------------------------------


@pytest.fixture
def registry(home: Path) -> Iterator[Registry]:
    settings = Settings.load(home=home)
    open_database(settings).dispose()
    engine = connect(settings.resolved_database_url)
    yield Registry(engine)
    engine.dispose()


def written(folder: Path, config: dict[str, Any] | None = None) -> Path:
    write(folder, config)
    return folder


def register(registry: Registry, name: str, folder: Path, location: str, tenant: str = "") -> str:
    version = version_of(folder)
    registry.add(Registered(tenant, name, version, location, None, 4, 1, created_us=0))
    return version


def test_a_bound_version_is_the_one_that_is_read(
    home: Path, tmp_path: Path, registry: Registry
) -> None:
    versions = []
    for alpha in (4, 8):
        folder = written(tmp_path / f"v{alpha}", {"lora_alpha": alpha})
        versions.append(register(registry, "sql", folder, str(folder)))
    found = catalog(home, registry=registry)
    assert where(found, "sql", version=versions[0]) == tmp_path / "v4"
    assert where(found, "sql", version=versions[1]) == tmp_path / "v8"
    assert where(found, "sql") == tmp_path / "v8"


def test_a_bound_version_is_never_what_is_configured(
    home: Path, tmp_path: Path, registry: Registry
) -> None:
    write(home / "adapters" / "sql")
    folder = written(tmp_path / "other", {"lora_alpha": 4})
    version = register(registry, "sql", folder, str(folder))
    found = catalog(home, registry=registry)
    assert where(found, "sql", version=version) == folder
    assert where(found, "sql") == home / "adapters" / "sql"
    with pytest.raises(UnknownAdapter, match="version 000000000000, which the job was accepted"):
        where(found, "sql", version="0" * 64)


def test_a_tenant_is_not_told_of_another_s(home: Path, tmp_path: Path, registry: Registry) -> None:
    folder = written(tmp_path / "secret")
    version = register(registry, "secret", folder, str(folder), "acme")
    register(registry, "mine", folder, str(folder), "umbrella")
    found = catalog(home, registry=registry)
    assert where(found, "secret", "acme") == folder
    for bound in (None, version):
        with pytest.raises(UnknownAdapter) as caught:
            where(found, "secret", "umbrella", bound)
        assert str(caught.value).count("secret") == 1
    assert "mine" in str(caught.value) or bound


def test_a_registered_one_of_the_hub_is_fetched_once_and_must_be_that_version(
    hub: HubServer, home: Path, tmp_path: Path, registry: Registry
) -> None:
    version = register(registry, "sql", tmp_path / "v1", f"hub:acme/sql@{OLD}")
    found = catalog(home, registry=registry)
    first = where(found, "sql", version=version)
    assert first == home / "adapter-cache" / version
    asked = len(hub.asked)
    assert where(catalog(home, registry=registry), "sql", version=version) == first
    assert len(hub.asked) == asked
    register(registry, "other", tmp_path / "main", f"hub:acme/sql@{OLD}")
    with pytest.raises(InvalidAdapter, match="adapter 'other': its files are of version"):
        where(found, "other")
