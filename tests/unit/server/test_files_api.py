"""Files over OpenAI's own client: kept as they came, each its tenant's, however they are called."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Iterator

import httpx
import openai
import pytest
import sqlalchemy as sa

from lorabatch import Settings
from lorabatch.tables import files
from tests.http_server import served
from tests.openai_client import client_of

LINE = b'{"custom_id": "a"}\n'


@pytest.fixture
def plain(settings: Settings, valkey_url: str) -> Settings:
    """On the embedded database, for what databases have no part in."""
    return settings.model_copy(update={"broker_url": valkey_url})


@pytest.fixture
def plain_http(plain: Settings) -> Iterator[httpx.Client]:
    with served(plain) as url, httpx.Client(base_url=url, timeout=300.0) as client:
        yield client


def test_a_file_comes_back_as_it_was_sent(client: openai.OpenAI, http_settings: Settings) -> None:
    made = client.files.create(file=("in.jsonl", LINE), purpose="batch")
    assert (made.object, made.bytes, made.filename, made.purpose) == (
        *("file", len(LINE), "in.jsonl", "batch"),
    )
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).content == LINE
    assert [path.name for path in http_settings.files_folder.iterdir()] == [made.id]
    assert http_settings.files_folder.stat().st_mode & 0o077 == 0
    gone = client.files.delete(made.id)
    assert (gone.id, gone.deleted) == (made.id, True)
    assert list(http_settings.files_folder.iterdir()) == []
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(made.id)


def test_a_file_whose_content_is_elsewhere_is_no_error_of_ours(
    plain_http: httpx.Client, plain: Settings
) -> None:
    """Servers of several machines need one folder."""
    parts = {"file": ("in.jsonl", LINE)}
    made = plain_http.post("/v1/files", files=parts, data={"purpose": "batch"}).json()["id"]
    (plain.files_folder / made).unlink()
    answer = plain_http.get(f"/v1/files/{made}/content")
    assert answer.status_code == 404
    assert "its content is not in this server's folder" in answer.json()["error"]["message"]


def test_files_are_listed_in_pages(client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{n}", LINE), purpose="batch") for n in range(5)]
    newest_first = [file.id for file in reversed(made)]
    assert [file.id for file in client.files.list(limit=2)] == newest_first
    page = client.files.list(limit=2)
    assert ([file.id for file in page.data], page.has_more) == (newest_first[:2], True)
    rest = client.files.list(limit=10, after=newest_first[1], order="desc")
    assert ([file.id for file in rest.data], rest.has_more) == (newest_first[2:], False)
    oldest = client.files.list(limit=1, order="asc")
    assert oldest.data == made[:1]
    assert client.files.list(purpose="fine-tune").data == []
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-of-nobody")


def test_another_tenants_file_is_not_there(url: str, client: openai.OpenAI) -> None:
    mine = client.files.create(file=("in.jsonl", LINE), purpose="batch").id
    with client_of(url, tenant="acme") as other:
        assert other.files.list().data == []
        for ask in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError) as theirs:
                ask(mine)
            with pytest.raises(openai.NotFoundError) as unknown:
                ask("file-none")
            assert theirs.value.response.text == unknown.value.response.text.replace(
                "file-none", mine
            )
    assert client.files.retrieve(mine).id == mine


FILENAMES = [
    ("../../etc/passwd", "passwd"),
    ("..\\..\\boot.ini", "boot.ini"),
    ("/", "file"),
    ("=cmd()|'/calc'!A0", "calc'!A0"),
    ("a\tb\x85\x00.jsonl", "a_b__.jsonl"),
    ("x" * 999, "x" * 255),
    ("größe 中.jsonl", "größe 中.jsonl"),
]


def test_a_filename_is_only_shown(plain_http: httpx.Client, plain: Settings) -> None:
    http, folder = plain_http, plain.files_folder
    for name, shown in FILENAMES:
        sent = post(http, [("purpose", None, b"batch"), ("file", name, LINE)])
        assert (sent.status_code, sent.json()["filename"]) == (200, shown)
        (file,) = folder.rglob("*")
        assert file.name == sent.json()["id"]
        answer = http.get(f"/v1/files/{file.name}/content")
        assert answer.headers["content-disposition"] == f'attachment; filename="{file.name}.jsonl"'
        http.delete(f"/v1/files/{file.name}")
    assert post(http, [PURPOSE, ("file", "a\r\nb", LINE)]).status_code == 400


Parts = list[tuple[str, str | None, bytes]]
PURPOSE = ("purpose", None, b"batch")
FILE = ("file", "x", LINE)
BAD_UPLOADS: list[tuple[Parts, str]] = [
    ([PURPOSE], "file: missing"),
    ([FILE], "purpose: wanted batch (got None)"),
    ([("purpose", None, b"fine-tune"), FILE], "wanted batch (got 'fine-tune')"),
    ([PURPOSE, PURPOSE, FILE], "purpose: given twice"),
    ([PURPOSE, FILE, FILE], "file: given twice"),
    ([("purpose", None, b"b" * 2000), FILE], "purpose: wanted 1024 bytes"),
    ([PURPOSE, ("cost", None, b"1"), FILE], "'cost': no such field"),
    (
        [
            *[PURPOSE, ("expires_after[anchor]", None, b"created_at")],
            *[("expires_after[seconds]", None, b"5"), FILE],
        ],
        "expires_after[seconds]: wanted 3600 to 2592000 (got '5')",
    ),
]


def test_what_is_no_upload_is_refused(plain_http: httpx.Client, plain: Settings) -> None:
    http, folder = plain_http, plain.files_folder
    for parts, word in BAD_UPLOADS:
        sent = post(http, parts)
        assert (sent.status_code, word in sent.text) == (400, True), sent.text
    whole = multipart([PURPOSE, FILE])
    for cut in (3, 30, 100):
        sent = http.post("/v1/files", content=whole[:-cut], headers=HEADERS)
        assert sent.status_code == 400
    sent = http.post("/v1/files", content=whole, headers={"content-type": "application/json"})
    assert sent.status_code == 400
    assert list(folder.iterdir()) == []


def test_a_file_beyond_the_limit_is_refused(plain: Settings) -> None:
    settings = plain.model_copy(update={"http_max_file_bytes": 100_000})
    with served(settings) as url, client_of(url) as client:
        kept = client.files.create(file=("x", b"x" * 100_000), purpose="batch")
        for size in (100_001, 5_000_000):
            with pytest.raises(openai.APIStatusError) as refused:
                client.files.create(file=("x", b"x" * size), purpose="batch")
            assert refused.value.status_code == 413
        assert [path.name for path in settings.files_folder.iterdir()] == [kept.id]


def test_a_large_file_is_not_held_in_memory(plain_http: httpx.Client, plain: Settings) -> None:
    size, piece = 60 << 20, b"x" * 65_536
    head, _, tail = multipart([("purpose", None, b"batch"), ("file", "x", b"@@")]).partition(b"@@")

    def body() -> Iterator[bytes]:
        yield head
        for _ in range(size // len(piece)):
            yield piece
        yield tail

    tracemalloc.start()
    try:
        sent = plain_http.post("/v1/files", content=body(), headers=HEADERS)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (sent.status_code, sent.json()["bytes"]) == (200, size)
    assert (plain.files_folder / sent.json()["id"]).stat().st_size == size
    assert peak_bytes < 16 << 20


def test_a_file_that_has_expired_is_not_there(
    client: openai.OpenAI, database: sa.Engine, http_settings: Settings
) -> None:
    made = client.files.create(
        file=io.BytesIO(LINE),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert made.expires_at == made.created_at + 3600
    with database.begin() as connection:
        connection.execute(sa.update(files).values(expires_us=1))
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    assert client.files.list().data == []


BOUNDARY = "a-boundary"
HEADERS = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def multipart(parts: list[tuple[str, str | None, bytes]]) -> bytes:
    """Written by hand: clients clean their filenames."""
    body = b""
    for name, filename, value in parts:
        quoted = "" if filename is None else filename.replace("\\", "\\\\").replace('"', "%22")
        called = "" if filename is None else f'; filename="{quoted}"'
        head = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"{called}\r\n\r\n'
        body += head.encode() + value + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


def post(http: httpx.Client, parts: list[tuple[str, str | None, bytes]]) -> httpx.Response:
    return http.post("/v1/files", content=multipart(parts), headers=HEADERS)
