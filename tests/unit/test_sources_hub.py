"""Adapters from a Hub: pinned, private, a mirror's, offline. A real server answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest

from lorabatch.errors import AdapterUnavailable, UnknownAdapter
from lorabatch.location import Location
from tests.hub_server import (
    CONFIG,
    MAIN,
    OLD,
    SHARED,
    SQL,
    WEIGHTS,
    HubServer,
    content,
    fetcher,
    wanted,
)

# -- what comes ---------------------------------------------------------------


@pytest.mark.parametrize(("revision", "sha"), [(None, MAIN), ("main", MAIN), ("v1", OLD)])
def test_a_revision_is_pinned_to_its_commit(
    hub: HubServer, home: Path, revision: str | None, sha: str
) -> None:
    pinned = fetcher(home).pin(Location("hub", "acme/sql", revision), SHARED)
    assert pinned == Location("hub", "acme/sql", sha)
    asked = len(hub.asked)
    assert fetcher(home).pin(pinned, SHARED) == pinned
    assert len(hub.asked) == asked


@pytest.mark.parametrize(("revision", "sha"), [(None, MAIN), ("v1", OLD), (OLD, OLD)])
def test_the_files_of_a_revision_come_and_nothing_else(
    hub: HubServer, home: Path, into: Path, revision: str | None, sha: str
) -> None:
    fetcher(home).fetch(Location("hub", "acme/sql", revision), SHARED, into)
    assert content(into) == wanted(hub, sha)
    assert not hub.ranges("huge.bin")


def test_what_lay_there_before_does_not_stay(hub: HubServer, home: Path, into: Path) -> None:
    (into / "folder").mkdir(parents=True)
    (into / "chat_template.jinja").write_text("of another")
    (into / CONFIG).write_text("{}")
    (into / WEIGHTS).symlink_to(home / "elsewhere")
    fetcher(home).fetch(SQL, SHARED, into)
    assert content(into) == wanted(hub)


def test_the_standard_variables_name_a_mirror_and_a_token(
    hub: HubServer, home: Path, into: Path
) -> None:
    hub.token = "hf_ours"
    code = (
        "from lorabatch import Settings; from lorabatch.location import Location\n"
        "from lorabatch_worker.adapters.sources import Fetcher\n"
        f"Fetcher(Settings.load(home={str(home)!r})).fetch(Location.parse('hub:acme/sql'), '', "
        f"__import__('pathlib').Path({str(into)!r}))"
    )
    variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_ours", "HF_HOME": str(home / "hf")}
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **variables})
    assert content(into) == wanted(hub)


# -- who may ------------------------------------------------------------------


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    folder = tmp_path / "tokens"
    folder.mkdir()
    (folder / "acme").write_text("hf_of-acme\n")
    (folder / "wrong").write_text("hf_wrong")
    (folder / "two").write_text("hf_secret\nhf_more")
    (folder / "empty").write_text("\n")
    return folder


def test_a_tenant_shows_its_own_token(
    hub: HubServer, home: Path, into: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    hub.token = "hf_of-acme"
    found = fetcher(home, hub_token_folder=tokens)
    found.fetch(found.pin(SQL, "acme"), "acme", into)
    assert content(into) == wanted(hub)
    assert hub.tokens == {"Bearer hf_of-acme"}


def test_a_store_of_files_elsewhere_is_not_shown_the_token(
    hub: HubServer, home: Path, into: Path, tokens: Path
) -> None:
    store = HubServer(hub.folders[MAIN], hub.folders[OLD])
    hub.store, hub.token, store.cut_after = store, "hf_of-acme", 1000
    fetcher(home, hub_token_folder=tokens).fetch(SQL, "acme", into)
    assert content(into) == wanted(hub)
    assert store.tokens == {None}
    assert store.ranges(WEIGHTS) == [None, "bytes=1000-"]
    store.close()


@pytest.mark.parametrize("tenant", ["wrong", "nobody"])
@pytest.mark.parametrize("configured", [True, False])
def test_no_tenant_gets_what_only_this_machine_may_read(
    hub: HubServer,
    home: Path,
    into: Path,
    tokens: Path,
    monkeypatch: pytest.MonkeyPatch,
    tenant: str,
    configured: bool,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    hub.token = "hf_ours"
    found = fetcher(home, hub_token_folder=tokens if configured else None)
    sentences = set()
    for where in (SQL, Location("hub", "acme/nothing"), Location("hub", "acme/sql", "v9")):
        for call in (found.pin, lambda *what: found.fetch(*what, into)):
            with pytest.raises(UnknownAdapter) as caught:
                call(where, tenant)
            sentences.add(str(caught.value).replace(str(where), "LOCATION"))
    assert len(sentences) == 1
    assert "Bearer hf_ours" not in hub.tokens
    found.fetch(SQL, SHARED, into)
    assert "Bearer hf_ours" in hub.tokens


@pytest.mark.parametrize("tenant", ["two", "empty"])
def test_a_token_file_without_a_token_is_named_and_not_repeated(
    hub: HubServer, home: Path, tokens: Path, tenant: str
) -> None:
    with pytest.raises(AdapterUnavailable, match=f"token file of tenant '{tenant}'") as caught:
        fetcher(home, hub_token_folder=tokens).pin(SQL, tenant)
    assert "hf_" not in str(caught.value)
    assert not hub.asked


def test_a_tenant_name_never_leads_out_of_the_folder(
    hub: HubServer, home: Path, tokens: Path
) -> None:
    for tenant in ("../tokens/acme", str(tokens / "acme"), "."):
        fetcher(home, hub_token_folder=tokens).pin(SQL, tenant)
    assert hub.tokens == {None}


# -- without a network --------------------------------------------------------


@pytest.fixture
def offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The machine's Hub cache holds v1 as huggingface_hub laid it there; then the network went."""
    fill_cache(Path(huggingface_hub.constants.HF_HUB_CACHE), hub.folders[OLD])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return hub


def fill_cache(cache: Path, files: Path) -> None:
    """As huggingface_hub lays it out: refs, blobs, and a snapshot of symlinks to them."""
    repo = cache / "models--acme--sql"
    for folder in ("refs", "blobs", f"snapshots/{OLD}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "v1").write_text(OLD)
    for path in files.iterdir():
        (repo / "blobs" / path.name).write_bytes(path.read_bytes())
        (repo / "snapshots" / OLD / path.name).symlink_to(f"../../blobs/{path.name}")


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_offline_shared_adapters_come_from_the_machines_cache(
    offline: HubServer, home: Path, into: Path, revision: str
) -> None:
    where = Location("hub", "acme/sql", revision)
    pinned = fetcher(home).pin(where, SHARED)
    assert pinned.revision == OLD
    for location in (pinned, where):
        fetcher(home).fetch(location, SHARED, into)
        assert content(into) == wanted(offline, OLD)
    assert not offline.asked


def test_offline_nothing_else_does(offline: HubServer, home: Path, into: Path) -> None:
    with pytest.raises(AdapterUnavailable, match=r"cache does not have it: run `hf download acme"):
        fetcher(home).pin(SQL, SHARED)
    with pytest.raises(AdapterUnavailable, match="only shared adapters"):
        fetcher(home).fetch(Location("hub", "acme/sql", "v1"), "acme", into)
    assert not offline.asked
