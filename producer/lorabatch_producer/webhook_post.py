"""One POST to a URL that somebody else gave: to an address that was looked at, and no further.

The name is resolved once, every address of it is checked (`lorabatch.outgoing`), and the connection
goes to one of these, with TLS for the name. No redirect is followed, no proxy asked and no cookie
kept; of the answer the status and `Retry-After` are read, up to ANSWER_BYTES of headers, and no
body. All of it ends within `timeout_s`, however slowly the other side goes. Raises PostFailed,
whose text names no address.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h11

import lorabatch
from lorabatch.outgoing import Rules, Target, check_target, parse_url, vetted

__all__ = ["Answer", "PostFailed", "Poster"]

ANSWER_BYTES = 16_384
READ_BYTES = 4096
ADDRESSES = 3
LONGEST_CONNECT_S = 5.0
AGENT = f"lorabatch/{lorabatch.__version__}"


class PostFailed(Exception):
    """There was no answer; the text says why, in our own words."""


@dataclass(frozen=True)
class Answer:
    """`retry_after_s`: if it says so in seconds."""

    status: int
    retry_after_s: float | None


class Poster:
    """Used from one event loop."""

    def __init__(
        self, rules: Rules, timeout_s: float, at_once: int, ca_file: Path | None = None
    ) -> None:
        """`at_once`: posts at a time. `ca_file`: trusted besides the system's certificates."""
        self._rules = rules
        self._timeout_s = timeout_s
        self._connect_s = min(timeout_s, LONGEST_CONNECT_S)
        # Its own threads: a name server that hangs holds up nobody who waits for the database.
        self._resolving = ThreadPoolExecutor(at_once, thread_name_prefix="resolve")
        self._tls = ssl.create_default_context()
        if ca_file is not None:
            self._tls.load_verify_locations(ca_file)

    def close(self) -> None:
        self._resolving.shutdown(wait=False, cancel_futures=True)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        try:
            async with asyncio.timeout(self._timeout_s):
                target, addresses = await self._vetted(url)
                async with self._connected(target, addresses) as streams:
                    return await _exchange(*streams, target, headers, body)
        except TimeoutError:
            raise PostFailed(f"no answer within {self._timeout_s:g} s") from None
        except ssl.SSLError as error:
            raise PostFailed(
                f"TLS: {(error.reason or 'failed').replace('_', ' ').lower()}"
            ) from None
        except socket.gaierror:
            raise PostFailed("the host's name was not found") from None
        except OSError as error:
            raise PostFailed(f"no connection: {type(error).__name__}") from None
        except h11.RemoteProtocolError:
            raise PostFailed("the answer is no HTTP, or its headers are too long") from None

    async def _vetted(self, url: str) -> tuple[Target, list[str]]:
        """What is connected to: nothing asks for the name again."""
        try:
            target = parse_url(url)
            check_target(target, self._rules)
            ask = partial(socket.getaddrinfo, target.host, target.port, type=socket.SOCK_STREAM)
            infos = await asyncio.get_running_loop().run_in_executor(self._resolving, ask)
            return target, vetted(target, self._rules, infos)
        except ValueError as error:
            raise PostFailed(f"refused: {error}") from None

    @contextlib.asynccontextmanager
    async def _connected(
        self, target: Target, addresses: list[str]
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await self._connect(target, addresses)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()  # nothing more is said, or heard
            await asyncio.sleep(0)  # it is closed now, and not when the loop comes to it

    async def _connect(
        self, target: Target, addresses: list[str]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        tls = target.scheme == "https"
        failed: PostFailed | None = None
        for address in addresses[:ADDRESSES]:
            try:
                async with asyncio.timeout(self._connect_s):
                    return await asyncio.open_connection(
                        address,
                        target.port,
                        ssl=self._tls if tls else None,
                        server_hostname=target.host if tls else None,
                    )
            except ssl.SSLError:
                raise
            except OSError as error:  # TimeoutError is one
                failed = PostFailed(f"no connection: {type(error).__name__}")
        assert failed is not None, "there is an address"
        raise failed


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    target: Target,
    headers: Mapping[str, str],
    body: bytes,
) -> Answer:
    wire = h11.Connection(h11.CLIENT, max_incomplete_event_size=ANSWER_BYTES)
    all_headers = {
        "Host": target.netloc,
        "User-Agent": AGENT,
        "Content-Length": str(len(body)),
        "Connection": "close",
        **headers,
    }
    request = h11.Request(method="POST", target=target.path, headers=list(all_headers.items()))
    for event in (request, h11.Data(data=body), h11.EndOfMessage()):
        writer.write(wire.send(event) or b"")
    writing = asyncio.ensure_future(writer.drain())
    try:  # who refuses a long body may answer before it has read it
        while not isinstance(heard := wire.next_event(), h11.Response):
            if heard is h11.NEED_DATA:
                wire.receive_data(await reader.read(READ_BYTES))
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
    return Answer(heard.status_code, _retry_after_s(heard))


def _retry_after_s(response: h11.Response) -> float | None:
    for name, value in response.headers:
        if name == b"retry-after" and value.isdigit() and len(value) < 10:
            return float(value)
    return None
