"""A Hub of one repository on this machine: what huggingface_hub asks for, and the ways it fails.

`serve` also makes huggingface_hub ask it, from an empty cache and without a token.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from lorabatch import Settings
from lorabatch.location import Location
from lorabatch_worker.adapters import attempts
from lorabatch_worker.adapters.sources import Fetcher
from tests.bad_adapters import write

MAIN, OLD = "a" * 40, "b" * 40
REPO = "acme/sql"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SQL = Location("hub", REPO)
SHARED = ""


class HubServer(ThreadingHTTPServer):
    """Serves `acme/sql` at main and v1 from a folder each.

    `token`: makes it private. `statuses`: answers to the next requests, before all else.
    `cut_after`: the next file ends after so many bytes. `spoil`: files come with another content.
    `store`: the server that files are sent from, by a redirect. `hang`: cleared, it answers
    nothing. `trickle`: a file's bytes come one by one.
    """

    daemon_threads = True

    def __init__(self, main: Path, old: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folders = {MAIN: main, OLD: old}
        self.revisions = {"main": MAIN, MAIN: MAIN, "v1": OLD, OLD: OLD}
        self.token: str | None = None
        self.statuses: list[int] = []
        self.retry_after: str | None = None
        self.cut_after: int | None = None
        self.spoil = False
        self.store: HubServer | None = None
        self.trickle = False
        self.hang = threading.Event()
        self.hang.set()
        self.asked: list[tuple[str, str | None]] = []  # path, Range
        self.tokens: set[str | None] = set()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def ranges(self, name: str) -> list[str | None]:
        """Of each request for a file, in order."""
        return [span for path, span in self.asked if path.endswith(f"/{name}")]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who asked has gone: a worker that was stopped."""

    def close(self) -> None:
        self.hang.set()
        self.trickle = False
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append((path, self.headers.get("Range")))
        token = self.headers.get("Authorization")
        self.server.tokens.add(token)
        self.server.hang.wait()
        parts = path.strip("/").split("/")
        if self.server.statuses:
            wait = self.server.retry_after
            status = self.server.statuses.pop(0)
            self.give(status, b"{}", {"Retry-After": wait} if wait else {})
        elif self.server.token and token != f"Bearer {self.server.token}":
            self.give(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/".join(parts[:4]) == f"api/models/{REPO}":
            self.about(parts[5] if len(parts) > 5 else "main")
        elif "/".join(parts[:3]) == f"{REPO}/resolve" and parts[3] in self.server.revisions:
            self.file(self.server.folders[self.server.revisions[parts[3]]] / parts[4])
        else:
            self.give(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def about(self, revision: str) -> None:
        sha = self.server.revisions.get(revision)
        if sha is None:
            self.give(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [sibling(path) for path in sorted(self.server.folders[sha].iterdir())]
        info = {"id": REPO, "modelId": REPO, "sha": sha, "private": False, "tags": []}
        self.give(200, json.dumps({**info, "siblings": siblings}).encode(), {})

    def file(self, path: Path) -> None:
        if not path.is_file():
            self.give(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        if self.server.store:
            self.give(302, b"", {"Location": self.server.store.url + self.path})
            return
        body = path.read_bytes()
        if self.server.trickle:
            self.drip(body)
            return
        if self.server.spoil:
            body = body[:-1] + bytes([body[-1] ^ 1])
        span = self.headers.get("Range")
        start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
        self.give(206 if span else 200, body[start:], {"ETag": '"x"'}, self.server.cut_after)

    def drip(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for i in range(len(body)):
            if not self.server.trickle:
                break
            self.wfile.write(body[i : i + 1])
            threading.Event().wait(0.01)
        self.close_connection = True

    def give(
        self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if cut is not None and cut < len(body):
            self.server.cut_after = None
            body, self.close_connection = body[:cut], True
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def sibling(path: Path) -> dict[str, Any]:
    """As the Hub tells of a file: of large ones the sha256, of small ones the git blob."""
    body = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    found: dict[str, Any] = {"rfilename": path.name, "size": len(body), "blobId": blob}
    if path.suffix == ".safetensors":
        digest = hashlib.sha256(body).hexdigest()
        found["lfs"] = {"sha256": digest, "size": len(body), "pointerSize": 130}
    return found


@contextlib.contextmanager
def serve(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub of one adapter. What fails is tried again after little."""
    write(folder / "main")
    write(folder / "v1", {"lora_alpha": 4})
    (folder / "main" / "huge.bin").write_bytes(b"not asked for")
    server = HubServer(folder / "main", folder / "v1")
    ask(server.url, monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub-cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(attempts, "FIRST_DELAY_S", 0.01)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.close()


def ask(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if HF_ENDPOINT had been set at the start."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def fetcher(home: Path, **more: Any) -> Fetcher:
    return Fetcher(Settings.load(home=home, **more))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def wanted(hub: HubServer, sha: str = MAIN) -> dict[str, bytes]:
    found = content(hub.folders[sha])
    found.pop("huge.bin", None)
    return found
