"""A receiver of webhooks on a port of its own, which answers as a test says."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

__all__ = ["Post", "Receiver", "receiving"]

OK = b"HTTP/1.1 204 No Content\r\n\r\n"
WAIT_S = 30.0


@dataclass(frozen=True)
class Post:
    """What came."""

    line: str
    headers: dict[str, str]
    body: bytes


Answering = Callable[[socket.socket, Post], None]


def answers(*answers: bytes) -> Answering:
    """These in turn, and the last one again and again."""
    left = list(answers)

    def answer(connection: socket.socket, post: Post) -> None:
        connection.sendall(left.pop(0) if len(left) > 1 else left[0])

    return answer


@dataclass
class Receiver:
    """`posts`: all that came, whole."""

    port: int
    posts: list[Post] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    came: threading.Condition = field(default_factory=threading.Condition)

    def wait(self, posts: int) -> list[Post]:
        """Once so many have come."""
        with self.came:
            there = self.came.wait_for(lambda: len(self.posts) >= posts, WAIT_S)
            assert there, f"{len(self.posts)} came, wanted {posts}"
            return list(self.posts)


@contextlib.contextmanager
def receiving(
    answer: Answering | None = None, tls: ssl.SSLContext | None = None
) -> Iterator[Receiver]:
    """It is there until the block is left."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(0.05)
    receiver = Receiver(listening.getsockname()[1])
    say = answer or answers(OK)

    def one(plain: socket.socket) -> None:
        with contextlib.suppress(OSError), plain:
            plain.settimeout(WAIT_S)
            connection = tls.wrap_socket(plain, server_side=True) if tls else plain
            with connection:
                post = _read(connection)
                with receiver.came:
                    receiver.posts.append(post)
                    receiver.came.notify_all()
                say(connection, post)

    def listen() -> None:
        threads = []
        while not receiver.over.is_set():
            with contextlib.suppress(TimeoutError):
                threads.append(threading.Thread(target=one, args=listening.accept()[:1]))
                threads[-1].start()
        for thread in threads:
            thread.join()

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.over.set()
        thread.join()
        listening.close()


def _read(connection: socket.socket) -> Post:
    with connection.makefile("rb") as file:
        line = file.readline().decode().strip()
        headers = {}
        while text := file.readline().decode().strip():
            name, _, value = text.partition(": ")
            headers[name.lower()] = value
        return Post(line, headers, file.read(int(headers["content-length"])))


def until(true: Callable[[], bool]) -> None:
    """Raises AssertionError after a long time."""
    end_s = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end_s, "it did not come true"
        time.sleep(0.01)
