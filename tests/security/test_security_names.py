"""Names, ids and keys: nobody's but their owner's, no path, no line of a log, and no assert guards
them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
import structlog

from lorabatch import Job, Ledger, Settings
from lorabatch.errors import AdapterUnavailable, InvalidAdapter, UnknownAdapter
from lorabatch.job import MergedAdapters
from lorabatch.keys import Keys
from lorabatch.logs import configure_logging
from lorabatch.registry import Registered, Registry
from lorabatch_worker.adapters.catalog import AdapterCatalog
from lorabatch_worker.adapters.sources import Fetcher
from lorabatch_worker.adapters.wanted import Wanted, WantedMerge
from lorabatch_worker.outcome import explained
from tests.http_server import served
from tests.hub_server import HubServer

on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
LINE = b'{"custom_id": "a", "url": "/v1/completions", "body": {"model": "base", "prompt": "a"}}\n'
WRONG = ("../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%00", "a%0ab", "=cmd()", "x" * 300)


@on_sqlite
def test_anothers_ids_are_answered_as_unknown_ones(
    http_settings: Settings, database: sa.Engine
) -> None:
    """Word for word, but for the id itself."""
    (_, mine), (_, other) = Keys(database).create("acme"), Keys(database).create("globex")
    Registry(database).add(Registered("acme", "secret", "1" * 64, "/a", None, 8, 1, 0))
    on = http_settings.model_copy(update={"http_keys": "on", "base_model": "base"})
    with served(on) as url, httpx.Client(base_url=url, timeout=30.0) as http:
        owner, stranger = ({"Authorization": f"Bearer {text}"} for text in (mine, other))
        job = http.post("/jobs", json={"prompt": "a"}, headers=owner).json()["job_id"]
        upload: Any = {"data": {"purpose": "batch"}, "files": {"file": ("a", LINE)}}
        file = http.post("/v1/files", headers=owner, **upload).json()["id"]
        made = {"endpoint": "/v1/completions", "completion_window": "24h", "input_file_id": file}
        batch = http.post("/v1/batches", json=made, headers=owner).json()["id"]
        asked: list[tuple[str, str, str, Any]] = [
            ("GET", "/jobs/{}", job, None),
            ("GET", "/jobs/{}?wait_s=1", job, None),
            ("GET", "/jobs/{}/events", job, None),
            ("DELETE", "/jobs/{}", job, None),
            ("GET", "/v1/files/{}", file, None),
            ("GET", "/v1/files/{}/content", file, None),
            ("DELETE", "/v1/files/{}", file, None),
            ("GET", "/v1/files?after={}", file, None),
            ("GET", "/v1/batches/{}", batch, None),
            ("POST", "/v1/batches/{}/cancel", batch, None),
            ("GET", "/v1/batches?after={}", batch, None),
            ("GET", "/v1/models/{}", "secret", None),
            ("POST", "/v1/completions", "secret", {"prompt": "a", "model": "{}"}),
            ("POST", "/generate", "secret", {"inputs": "a", "parameters": {"adapter_id": "{}"}}),
            ("POST", "/v1/batches", file, {**made, "input_file_id": "{}"}),
        ]
        for method, path, known, body in asked:
            unknown = known[:-1] + ("0" if known[-1] != "0" else "1")
            answers = []
            for name in (known, unknown):
                text = None if body is None else json.dumps(body).replace("{}", name)
                headers = {**stranger, "content-type": "application/json"}
                answer = http.request(method, path.format(name), content=text, headers=headers)
                answers.append((answer.status_code, answer.text.replace(name, "ID")))
            assert answers[0] == answers[1], (method, path)
            assert answers[0][0] in (404, 422), (method, path)
        assert http.get(f"/jobs/{job}", headers=owner).status_code == 200
        assert http.get(f"/v1/files/{file}/content", headers=owner).content == LINE


def test_merges_whose_names_collide_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge is called by a short hash; what it is, its fields say."""
    monkeypatch.setattr(MergedAdapters, "name", "merged/collides")
    specs = [MergedAdapters(ids=("a", "b")), MergedAdapters(ids=("a", "c"))]
    assert {spec.name for spec in specs} == {"merged/collides"}
    assert len({WantedMerge(spec, ()) for spec in specs}) == 2
    jobs = [Job(job_id="j", prompt="a", merged_adapters=spec) for spec in specs]
    assert jobs[0].request_hash() != jobs[1].request_hash()


@on_sqlite
def test_an_id_is_never_a_path(http: httpx.Client, http_settings: Settings) -> None:
    http_settings.files_folder.mkdir()
    (http_settings.home / "secret").write_text("a secret")
    for name in (*WRONG, "..%2fsecret", "%2e%2e%2fsecret", str(http_settings.home / "secret")):
        for path in ("/jobs/{}", "/v1/files/{}", "/v1/files/{}/content", "/v1/batches/{}"):
            answer = http.get(path.format(name))
            assert answer.status_code == 404, path.format(name)
            assert "a secret" not in answer.text
        http.delete(f"/v1/files/{name}")
    assert (http_settings.home / "secret").read_text() == "a secret"


@on_sqlite
def test_a_files_name_is_only_shown(http: httpx.Client, http_settings: Settings) -> None:
    for name in ("../../x", "..\\x", "/etc/x", "a\nb", "=cmd()", "a\r\nX-Mine: b"):
        upload: Any = {"data": {"purpose": "batch"}, "files": {"file": (name, LINE)}}
        made = http.post("/v1/files", **upload).json()
        content = http.get(f"/v1/files/{made['id']}/content")
        assert (content.content, "x-mine" in content.headers) == (LINE, False)
        assert "\n" not in made["filename"]
    folder = http_settings.files_folder
    assert {path.parent for path in http_settings.home.rglob("*x")} <= {folder}
    assert len(list(folder.iterdir())) == 6


def test_no_error_of_an_adapter_says_where_it_is(hub: HubServer, tmp_path: Path) -> None:
    """Not to a job's owner; to who registers it, and to the log."""
    adapters = f"a=acme/nothing,b=s3://hidden-bucket/x,c={tmp_path}/gone,d=acme/sql"
    settings = Settings.load(
        home=tmp_path / "home", adapters=adapters, adapter_fetch_attempts=1,
        adapter_roots=(tmp_path / "allowed",),
    )  # fmt: skip
    (tmp_path / "gone").mkdir()
    catalog, said = AdapterCatalog(settings), list[str]()
    for name in "abcd":
        hub.statuses = [400] if name == "d" else []
        with (
            pytest.raises((AdapterUnavailable, UnknownAdapter, InvalidAdapter)) as caught,
            catalog.hold(catalog.find(Wanted("", name))),
        ):
            pass
        said.append(explained(caught.value, "adapter").message)
    for name, sentence in zip("abcd", said, strict=True):
        assert sentence.startswith(f"adapter '{name}': ")
        for place in ("acme/", "s3:", "hidden", "127.0.0.1", str(tmp_path), "hub:", "TOKEN"):
            assert place not in sentence
    with pytest.raises(UnknownAdapter, match="hub:acme/nothing"):
        Fetcher(settings).pin(catalog.find(Wanted("", "a")).location, "")


@on_sqlite
def test_no_error_of_the_database_says_where_it_is(
    http: httpx.Client, ledger: Ledger, http_settings: Settings
) -> None:
    with ledger.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs RENAME TO elsewhere")
    for path in ("/readyz", "/health", "/jobs/x"):
        answer = http.get(path)
        assert answer.status_code == 503
        for place in (str(http_settings.home), "sqlite", "elsewhere", "no such table"):
            assert place not in answer.text


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_name_is_no_line_of_a_log(
    settings: Settings, log_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    configure_logging(settings.model_copy(update={"log_format": log_format}))
    try:
        structlog.get_logger("t").warning("message refused", job_id="a\n2026 [error] forged\x1b[2J")
    finally:
        monkeypatch.undo()
        configure_logging(settings)
    assert written.getvalue().count("\n") == 1
    assert "\x1b" not in written.getvalue()


UNDER_O = """
import json, sys
from pathlib import Path
from lorabatch import Job, Settings
from lorabatch.database import open_database
from lorabatch.errors import LoraBatchError
from lorabatch.keys import Keys
from lorabatch.location import Location
from lorabatch_producer.fields import make_job
from lorabatch_producer.openai_body import body_fields
from lorabatch_producer.server.models import Models
from lorabatch_producer.server.uploads import Upload, shown_filename
from lorabatch_producer.tgi_body import generate_fields
home = Path(sys.argv[1])
settings = Settings.load(home=home, base_model="base")
engine = open_database(settings)
keys = Keys(engine)
_, text = keys.create("acme")
def refused(call, *given, **fields):
    try:
        call(*given, **fields)
    except Exception as error:
        return type(error).__name__
chat = "/v1/chat/completions"
print(json.dumps({
    "optimized": sys.flags.optimize,
    "tokens": refused(make_job, prompt="a", max_new_tokens=10**9),
    "nan": refused(make_job, prompt="a", temperature=float("nan")),
    "empty": refused(make_job, prompt=""),
    "nul": refused(make_job, prompt="a\\0"),
    "path": refused(make_job, prompt="a", adapter_id="../x"),
    "tenant": refused(make_job, prompt="a", tenant="=cmd()"),
    "n": refused(body_fields, {"messages": [], "n": 10**9}, chat),
    "tgi": refused(generate_fields, {"inputs": "a", "parameters": {"best_of": 10**9}}),
    "model": refused(Models(engine, settings).find, "acme", "../x"),
    "location": refused(Location.parse, "s3://user:password@bucket"),
    "upload": refused(Upload, home / "x", "text/plain", 9),
    "filename": shown_filename(b"../../x"),
    "keys": [keys.check(bad) is None for bad in ("", "lb-", text[:-1], text[:-1] + "~")],
    "right": keys.check(text).tenant,
}))
"""


def test_no_assert_is_a_guard(home: Path) -> None:
    """The same refusals by a Python that leaves asserts out."""
    command = [sys.executable, "-O", "-c", UNDER_O, str(home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found.pop("optimized"), found.pop("right"), found.pop("filename")) == (1, "acme", "x")
    assert found.pop("keys") == [True] * 4
    assert found.pop("model") == "UnknownAdapter"
    assert (found.pop("location"), found.pop("upload")) == ("ValueError", "HTTPException")
    assert set(found.values()) == {"InvalidJob"}, found
