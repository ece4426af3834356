"""One POST: to the address that was looked at, for the name that was given, and no further."""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lorabatch.outgoing import Rules
from lorabatch_producer.webhook_post import Answer, Poster, PostFailed
from tests.receiver import OK, Post, answers, receiving

LOCAL = Rules(private=True, ports=())
PUBLIC = Rules(ports=())
SIGNED = {"webhook-id": "msg_1", "Content-Type": "application/json"}


@contextlib.asynccontextmanager
async def poster(
    rules: Rules = LOCAL, timeout_s: float = 30.0, **more: Any
) -> AsyncIterator[Poster]:
    one = Poster(rules, timeout_s, 2, **more)
    yield one
    one.close()


async def failure(url: str, rules: Rules = LOCAL, timeout_s: float = 30.0, **more: Any) -> str:
    async with poster(rules, timeout_s, **more) as one:
        with pytest.raises(PostFailed) as caught:
            await one.post(url, SIGNED, b"{}")
    return str(caught.value)


async def test_what_is_posted_comes_as_it_was() -> None:
    body = b'{"text": "' + b"x" * 3_000_000 + b'"}'
    with receiving() as there:
        async with poster() as one:
            answer = await one.post(f"http://127.0.0.1:{there.port}/a?b=c", SIGNED, body)
    (post,) = there.posts
    assert answer == Answer(204, None)
    assert (post.line, post.body) == ("POST /a?b=c HTTP/1.1", body)
    assert post.headers["host"] == f"127.0.0.1:{there.port}"
    assert post.headers["webhook-id"] == "msg_1"
    assert post.headers["user-agent"].startswith("lorabatch/")


async def test_a_redirect_is_an_answer_and_not_followed() -> None:
    with receiving() as other:
        to = f"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://127.0.0.1:{other.port}/\r\n\r\n"
        with receiving(answers(to.encode())) as there:
            async with poster() as one:
                answer = await one.post(f"http://127.0.0.1:{there.port}/", SIGNED, b"{}")
    assert answer.status == 307
    assert (len(there.posts), len(other.posts)) == (1, 0)


async def test_retry_after_and_an_answer_in_two_parts() -> None:
    early = b"HTTP/1.1 100 Continue\r\n\r\n"
    busy = b"HTTP/1.1 503 Busy\r\nRetry-After: 120\r\nContent-Length: 9\r\n\r\nnot read."
    with receiving(answers(early + busy)) as there:
        async with poster() as one:
            answer = await one.post(f"http://127.0.0.1:{there.port}/", SIGNED, b"{}")
    assert answer == Answer(503, 120.0)


@pytest.mark.parametrize(
    "said",
    [b"", b"hello\r\n\r\n", b"\x16\x03\x01" * 9000],
    ids=["nothing", "no HTTP", "TLS"],
)
async def test_what_is_no_answer(said: bytes) -> None:
    with receiving(answers(said)) as there:
        told = await failure(f"http://127.0.0.1:{there.port}/")
    assert told == "the answer is no HTTP, or its headers are too long"


async def test_no_more_is_read_than_an_answer_may_have() -> None:
    def endless(connection: socket.socket, post: Post) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:  # until nobody listens
            connection.sendall(b"X: y\r\n" * 100)
            time.sleep(0.001)

    with receiving(endless) as there:
        told = await failure(f"http://127.0.0.1:{there.port}/", timeout_s=5.0)
    assert told == "the answer is no HTTP, or its headers are too long"


async def test_one_that_hangs_and_one_that_drips_end_in_time() -> None:
    over = threading.Event()

    def drips(connection: socket.socket, post: Post) -> None:
        for byte in OK * 1000:
            connection.send(bytes([byte]))
            if over.wait(0.1):
                return

    def hangs(connection: socket.socket, post: Post) -> None:
        over.wait()

    for answer in (drips, hangs):
        over.clear()
        with receiving(answer) as there:
            began_s = time.monotonic()
            told = await failure(f"http://127.0.0.1:{there.port}/", timeout_s=0.3)
            over.set()
        assert told == "no answer within 0.3 s"
        assert time.monotonic() - began_s < 15


async def test_one_that_reads_nothing_ends_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/"
        async with poster(timeout_s=0.3) as one:
            with pytest.raises(PostFailed, match="no answer within"):
                await one.post(url, SIGNED, b"x" * 50_000_000)


async def test_nobody_there_and_no_such_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert await failure(f"http://127.0.0.1:{port}/") == "no connection: ConnectionRefusedError"

    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert await failure("https://hooks.example/") == "the host's name was not found"


async def test_a_forbidden_address_is_never_connected_to() -> None:
    with receiving() as there:
        said = [
            await failure(f"{scheme}://{host}:{there.port}/", PUBLIC)
            for scheme, host in (
                *(("http", "127.0.0.1"), ("https", "127.0.0.1"), ("https", "localhost")),
                *(("https", "[::1]"), ("https", "[::ffff:127.0.0.1]")),
            )
        ]
    assert there.posts == []
    assert all(text.startswith("refused: ") for text in said)


class Names:
    """Plays the resolver: each name's answers in turn, the last one again and again."""

    def __init__(self, **answers: list[str]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.real = socket.getaddrinfo

    def __call__(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        left = self.answers.get(host.partition(".")[0])
        if left is None:
            return self.real(host, port, *args, **kwargs)
        self.asked.append(host)
        address = left.pop(0) if len(left) > 1 else left[0]
        family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 6, "", (address, port))]


async def test_a_name_that_changes_its_mind_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(rebinding=["203.0.113.9", "127.0.0.1"], turned=["127.0.0.1", "8.8.8.8"])
    monkeypatch.setattr(socket, "getaddrinfo", names)
    with receiving() as there:
        assert "not one of the public" in await failure(
            f"https://rebinding.example:{there.port}/", PUBLIC
        )
        # allowed at first, and what the name stands for afterwards is not asked for
        async with poster() as one:
            answer = await one.post(f"http://turned.example:{there.port}/", SIGNED, b"{}")
    assert answer.status == 204
    assert names.asked == ["rebinding.example", "turned.example"]
    assert [post.headers["host"] for post in there.posts] == [f"turned.example:{there.port}"]


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    """A server's certificate for hooks.example, and the file of whom to trust for it."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hooks.example")])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("hooks.example")]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    form = serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return tls, folder / "cert.pem"


async def test_tls_is_for_the_name_at_the_address_that_was_vetted(
    certified: tuple[ssl.SSLContext, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tls, trusted = certified
    asked: list[str | None] = []
    tls.sni_callback = lambda _, name, __: asked.append(name)
    monkeypatch.setattr(socket, "getaddrinfo", Names(hooks=["127.0.0.1"], other=["127.0.0.1"]))
    with receiving(tls=tls) as there:
        url = f"https://hooks.example:{there.port}/"
        async with poster(ca_file=trusted) as one:
            assert (await one.post(url, SIGNED, b"{}")).status == 204
        other = await failure(f"https://other.example:{there.port}/", ca_file=trusted)
        unknown = await failure(url)
    assert asked == ["hooks.example", "other.example", "hooks.example"]
    assert len(there.posts) == 1
    assert {other, unknown} == {"TLS: certificate verify failed"}
