"""Requests that are too large, too deep, too slow or no text at all: each is refused before it
costs anything, in all dialects, and the server serves on."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from lorabatch import Ledger, Settings
from lorabatch_producer.server import serving

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
PATHS = ("/jobs", "/v1/completions", "/v1/chat/completions", "/generate", "/generate_stream", "/")
CHAT = {"messages": [{"role": "user", "content": "a"}]}
JSON = {"content-type": "application/json"}
LIMIT_BYTES = 100_000
READ_S = 0.5


@pytest.fixture
def http_settings(http_settings: Settings) -> Settings:
    return http_settings.model_copy(
        update={"base_model": "base", "http_max_body_bytes": LIMIT_BYTES, "http_read_s": READ_S}
    )


def body(path: str, **fields: Any) -> dict[str, Any]:
    """A request with some sampling fields, as the path's dialect has them."""
    if path.startswith("/v1/"):
        fields = {"max_tokens" if k == "max_new_tokens" else k: v for k, v in fields.items()}
        ask = CHAT if "chat" in path else {"prompt": "a"}
        return {"model": "base", **ask, **fields}
    if path == "/jobs":
        return {"prompt": "a", **fields}
    return {"inputs": "a", "parameters": fields}


def refused(answer: httpx.Response) -> None:
    assert answer.status_code in (400, 413, 415, 422), answer.text
    assert "a" * 100 not in answer.text


def test_numbers_beyond_all_bounds_are_refused(http: httpx.Client, ledger: Ledger) -> None:
    for path in PATHS:
        for fields in (
            {"max_new_tokens": 10**9},
            {"best_of": 10**9} if path != "/jobs" else {"n": 10**9},
            {"temperature": float("nan")},
            {"temperature": float("inf")},
            {"seed": 10**30},
            {"top_k": -1},
        ):
            text = json.dumps(body(path, **fields))
            refused(http.post(path, content=text, headers=JSON))
    assert ledger.counts() == {}


def test_a_prompt_that_is_empty_or_no_text_is_refused(http: httpx.Client, ledger: Ledger) -> None:
    for prompt in ("", "a\0b", "\ud800", ["a"] * 3, 7, {"a": 1}):
        message = [{"role": "user", "content": prompt}]
        for path, asked in {
            "/jobs": {"prompt": prompt},
            "/v1/completions": {"model": "base", "prompt": prompt},
            "/v1/chat/completions": {"model": "base", "messages": message if prompt else []},
            "/generate": {"inputs": prompt},
        }.items():
            refused(http.post(path, content=json.dumps(asked), headers=JSON))
    assert ledger.counts() == {}


def test_what_is_no_json_is_refused(http: httpx.Client, ledger: Ledger) -> None:
    for path in PATHS:
        for content in (
            b"",
            b"{",
            b"\xff\xfe{}",
            b'{"prompt": "\xff"}',
            b"[" * 50_000,
            b'{"a":' * 9_000,
            b'{"seed": ' + b"9" * 9_000 + b"}",
        ):
            refused(http.post(path, content=content, headers=JSON))
    assert ledger.counts() == {}
    assert http.get("/healthz").status_code == 200


def test_of_two_fields_of_one_name_the_last_counts_for_everything(
    http: httpx.Client, ledger: Ledger
) -> None:
    twice = b'{"prompt": "a", "tenant": "default", "tenant": "acme"}'
    refused(http.post("/jobs", content=twice, headers=JSON))
    assert ledger.counts() == {}


def test_a_body_of_a_gigabyte_is_refused_before_it_comes(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "LINGER_S", 0.2)
    for path in ("/jobs", "/v1/completions", "/generate"):
        sent = 0

        def pieces() -> Iterator[bytes]:
            nonlocal sent
            for _ in range(1 << 12):
                sent += 1 << 18
                time.sleep(0.002)
                yield b" " * (1 << 18)

        try:
            answer = http.post(path, content=pieces(), headers=JSON)
            assert answer.status_code == 413
        except httpx.WriteError:
            pass  # it was answered, and the connection closed, while this was still sent
        assert sent < 1 << 30, "the connection is closed soon"
        announced = raw(
            http, f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {1 << 30}\r\n\r\n"
        )
        assert b" 413 " in announced.splitlines()[0]


def test_a_compressed_body_is_refused(http: httpx.Client, ledger: Ledger) -> None:
    bomb = gzip.compress(b" " * (8 << 20))
    for path in (*PATHS, "/v1/files", "/v1/batches"):
        headers = {**JSON, "content-encoding": "gzip"}
        answer = http.post(path, content=bomb, headers=headers)
        assert (answer.status_code, "Content-Encoding" in answer.text) == (415, True)
    assert ledger.counts() == {}


def raw(http: httpx.Client, *parts: str, pause_s: float = 0.0) -> bytes:
    """What is answered to these bytes, until the server closes."""
    where = urlsplit(str(http.base_url))
    assert where.hostname is not None
    with socket.create_connection((where.hostname, where.port or 0), timeout=30.0) as connection:
        said = b""
        try:
            for part in parts:
                connection.sendall(part.encode("latin-1"))
                time.sleep(pause_s)
            while piece := connection.recv(1 << 16):
                said += piece
        except ConnectionError:
            pass
        return said


def test_headers_that_come_too_slowly_end_their_connection(http: httpx.Client) -> None:
    assert raw(http) == b"", "nothing was said"
    assert raw(http, "GET /healthz HTTP/1.1\r\n", "Host: a\r\n") == b""
    drops = [f"X-{number}: a\r\n" for number in range(30)]
    assert raw(http, "GET /healthz HTTP/1.1\r\n", *drops, pause_s=READ_S / 10) == b""
    both = raw(http, "GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", "GET /he", pause_s=0.2)
    assert both.count(b"200 OK") == 1, "the second request on a connection counts, too"


def test_a_body_that_comes_too_slowly_is_refused(http: httpx.Client, ledger: Ledger) -> None:
    head = "POST {} HTTP/1.1\r\nHost: a\r\nContent-Type: {}\r\nContent-Length: 99\r\n\r\n"
    for path in ("/jobs", "/v1/completions"):
        slow = raw(http, head.format(path, "application/json"), *"{" * 13, pause_s=READ_S / 10)
        assert b" 408 " in slow.splitlines()[0]
    form = "multipart/form-data; boundary=b"
    assert b" 408 " in raw(http, head.format("/v1/files", form), "--b\r\n").splitlines()[0]
    assert ledger.counts() == {}


def test_headers_are_no_way_into_an_answer_or_a_name(http: httpx.Client, ledger: Ledger) -> None:
    for tenant in ("a b", "=cmd()", "../x", "a" * 65, "a;b", "a\u00e9"):
        headers = {b"LoraBatch-Tenant": tenant.encode("latin-1")}
        assert http.post("/jobs", json=body("/jobs"), headers=headers).status_code == 422
    head = "POST /jobs HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 15\r\n"
    injected = raw(http, f"{head}Idempotency-Key: a\rX-Mine: b\r\n\r\n", '{"prompt": "a"}')
    assert b" 400 " in injected.splitlines()[0]
    assert b"X-Mine" not in injected
    too_long = http.post("/jobs", json=body("/jobs"), headers={"Idempotency-Key": "a" * 256})
    assert too_long.status_code == 422
    assert ledger.counts() == {}


def test_a_body_that_was_refused_ends_no_later_request(http: httpx.Client) -> None:
    """It came after its answer, as clients send it that write headers and body apart."""
    job_id = http.post("/jobs", json={"prompt": "a"}).json()["job_id"]
    place = urlsplit(str(http.base_url))
    late = "POST /jobs HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n"
    wait_s = serving.LINGER_S + 1
    look = f"GET /jobs/{job_id}?wait_s={wait_s} HTTP/1.1\r\nHost: a\r\n\r\n"
    with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
        connection.sendall(late.encode())
        assert connection.recv(10_000).startswith(b"HTTP/1.1 415")
        connection.sendall(b"{}" + look.encode())
        heard = b""
        while b'"queued"' not in heard and (more := connection.recv(10_000)):
            heard += more
    assert b"HTTP/1.1 200" in heard
