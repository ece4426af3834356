"""Which folder a name stands for: configured, in the data folder, on the Hub, or nowhere."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from lorabatch import Settings
from lorabatch.errors import AdapterUnavailable, UnknownAdapter
from lorabatch_worker.adapters.catalog import AdapterCatalog
from lorabatch_worker.adapters.weights import read_adapter
from tests.bad_adapters import TARGET, write


def catalog(home: Path, adapters: str = "") -> AdapterCatalog:
    return AdapterCatalog(Settings.load(home=home, adapters=adapters))


# -- folders ------------------------------------------------------------------


def test_a_configured_folder_is_found(home: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "a")
    found = catalog(home, f"acme/sql={tmp_path}/elsewhere/a")
    assert found.locate("acme/sql") == tmp_path / "elsewhere" / "a"
    assert found.names() == ["acme/sql"]


def test_a_relative_folder_is_that_of_the_start(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "mine" / "sql")
    monkeypatch.chdir(tmp_path)
    found = catalog(home, "sql=mine/sql")
    monkeypatch.chdir("/")
    assert found.locate("sql") == tmp_path / "mine" / "sql"


def test_folders_in_the_data_folder_need_no_configuration(home: Path) -> None:
    found = catalog(home)
    assert found.names() == []
    write(home / "adapters" / "b")
    (home / "adapters" / "not-an-adapter").mkdir()
    assert found.names() == ["b"]
    assert found.locate("b") == home / "adapters" / "b"


def test_a_configured_name_goes_before_the_data_folder(home: Path, tmp_path: Path) -> None:
    write(home / "adapters" / "a")
    write(tmp_path / "other")
    assert catalog(home, f"a={tmp_path}/other").locate("a") == tmp_path / "other"


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
        catalog(home).locate(name)
    assert f"adapter {name!r}" in str(caught.value)
    assert "b" in str(caught.value)
    assert str(home) not in str(caught.value)


def test_an_absolute_path_is_unknown(home: Path) -> None:
    write(home / "outside")
    with pytest.raises(UnknownAdapter):
        catalog(home).locate(str(home / "outside"))


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
        found.locate("sql")
    assert not asked


# -- the Hub ------------------------------------------------------------------

MAIN, OLD = "a" * 40, "b" * 40


class Hub(ThreadingHTTPServer):
    """Answers what huggingface_hub asks for one repository with two revisions."""

    daemon_threads = True

    def __init__(self, folders: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folders = folders
        self.revisions = {"main": MAIN, MAIN: MAIN, "v1": OLD, OLD: OLD}
        self.asked: list[str] = []
        self.status = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0].strip("/").split("/")
        if self.server.status:
            self.give(self.server.status, b"{}")
        elif path[:2] == ["api", "models"] and path[2:4] == ["acme", "sql"]:
            self.about(path[4], path[5])
        elif path[:3] == ["acme", "sql", "resolve"] and path[3] in self.server.revisions:
            self.file(self.server.revisions[path[3]], path[4])
        else:
            self.give(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def about(self, what: str, revision: str) -> None:
        sha = self.server.revisions.get(revision)
        if sha is None:
            self.give(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        files = sorted(p for p in self.server.folders[sha].iterdir())
        if what == "tree":
            entries = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": sha + p.name}
                for p in files
            ]
            self.give(200, json.dumps(entries).encode())
        else:
            siblings = [{"rfilename": p.name} for p in files]
            info = {"id": "acme/sql", "modelId": "acme/sql", "sha": sha, "siblings": siblings}
            self.give(200, json.dumps({**info, "private": False, "tags": []}).encode())

    def file(self, sha: str, name: str) -> None:
        path = self.server.folders[sha] / name
        if not path.is_file():
            self.give(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        self.give(200, path.read_bytes(), {"ETag": f'"{sha}-{name}"', "X-Repo-Commit": sha})

    def give(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub of one adapter; huggingface_hub asks it and has an empty cache."""
    folders = {MAIN: tmp_path / "repo" / "main", OLD: tmp_path / "repo" / "v1"}
    write(folders[MAIN])
    write(folders[OLD], {"lora_alpha": 4})
    (folders[MAIN] / "huge.bin").write_bytes(b"not asked for")
    server = Hub(folders)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def scale_of(folder: Path) -> float:
    return next(iter(read_adapter("x", folder, TARGET).sites.values())).scale


def test_an_adapter_comes_from_the_hub_with_its_own_files_only(hub: Hub, home: Path) -> None:
    folder = catalog(home, "acme/sql").locate("acme/sql")
    assert {p.name for p in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert scale_of(folder) == 2.0


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_revision_is_pinned(hub: Hub, home: Path, revision: str) -> None:
    found = catalog(home, f"old=acme/sql@{revision},new=acme/sql")
    assert scale_of(found.locate("old")) == 1.0
    assert scale_of(found.locate("new")) == 2.0


def test_once_fetched_it_loads_without_the_hub(hub: Hub, home: Path) -> None:
    first = catalog(home, "acme/sql@v1").locate("acme/sql")
    hub.shutdown()
    hub.server_close()
    assert catalog(home, "acme/sql@v1").locate("acme/sql") == first
    assert scale_of(first) == 1.0


@pytest.mark.parametrize("entry", ["x=acme/nothing", "x=acme/sql@v9"])
def test_what_the_hub_does_not_have_is_unknown(hub: Hub, home: Path, entry: str) -> None:
    with pytest.raises(UnknownAdapter) as caught:
        catalog(home, entry).locate("x")
    assert "adapter 'x'" in str(caught.value)
    assert entry.removeprefix("x=") in str(caught.value)


def test_a_hub_that_is_down_makes_it_unavailable(
    hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}"
        )
        with pytest.raises(AdapterUnavailable, match=r"adapter 'acme/sql': the Hub did not give"):
            catalog(home, "acme/sql").locate("acme/sql")


@pytest.mark.parametrize("status", [400, 403])
def test_a_hub_that_refuses_makes_it_unavailable(hub: Hub, home: Path, status: int) -> None:
    hub.status = status
    with pytest.raises(AdapterUnavailable, match=r"adapter 'acme/sql': the Hub did not give"):
        catalog(home, "acme/sql").locate("acme/sql")
