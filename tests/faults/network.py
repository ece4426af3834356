"""Three network namespaces on one machine: workers, a router, servers. Needs root and iproute2.

    workers 10.213.1.2 -- 10.213.1.1 router 10.213.2.1 -- 10.213.2.2 broker, 10.213.2.3 database
    this process 10.213.3.1 -- 10.213.3.2 servers, a way that is never cut

The router drops what it has a blackhole route for, one direction at a time; the kernel's socket
killer makes one end forget its connections; a token bucket makes the way slow.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from types import TracebackType
from typing import Self

__all__ = ["BROKER", "DATABASE", "SERVERS", "WORKERS", "Network"]

WORKERS, BROKER, DATABASE = "10.213.1.2", "10.213.2.2", "10.213.2.3"
SERVERS = "10.213.3.2"
"""Where this process finds the servers."""
SLOW = "tbf rate 400kbit burst 4kb latency 1s"


class Network:
    """Made on entering, gone on leaving; its names carry this process's id."""

    def __init__(self) -> None:
        mark = f"lb{os.getpid() % 100_000}"
        self.workers, self.router, self.servers = (f"{mark}{end}" for end in "wrs")
        self._outside = f"{mark}o"

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    @staticmethod
    def at(namespace: str) -> tuple[str, ...]:
        """The words before a command that runs there."""
        return ("ip", "netns", "exec", namespace)

    def partition(self, *addresses: str) -> None:
        """Drop what goes to these, without a word to who sends it."""
        for address in addresses:
            self._routes(f"route add blackhole {address}/32")

    def heal(self) -> None:
        for address in (WORKERS, BROKER, DATABASE):
            with contextlib.suppress(subprocess.CalledProcessError):
                self._routes(f"route del blackhole {address}/32")
        with contextlib.suppress(subprocess.CalledProcessError):
            _sh(*self.at(self.router), *"tc qdisc del dev toworkers root".split())
        self._routes("link set toworkers up")

    def unplug(self) -> None:
        """The workers' cable."""
        self._routes("link set toworkers down")

    def slow(self) -> None:
        _sh(*self.at(self.router), *f"tc qdisc add dev toworkers root {SLOW}".split())

    def forget(self, namespace: str, address: str) -> None:
        """End this side of all connections with that address; the other is sent a reset."""
        side = "src" if namespace == self.servers else "dst"
        _sh(*self.at(namespace), "ss", "-K", side, address)

    def _make(self) -> None:
        for name in (self.workers, self.router, self.servers):
            _sh("ip", "netns", "add", name)
            _sh("ip", "-n", name, "link", "set", "lo", "up")
        self._link(
            self.workers, "torouter", f"{WORKERS}/24", self.router, "toworkers", "10.213.1.1/24"
        )
        self._link(
            self.servers, "torouter", f"{BROKER}/24", self.router, "toservers", "10.213.2.1/24"
        )
        _sh(*f"ip -n {self.servers} addr add {DATABASE}/24 dev torouter".split())
        _sh(*f"ip -n {self.workers} route add default via 10.213.1.1".split())
        _sh(*f"ip -n {self.servers} route add 10.213.1.0/24 via 10.213.2.1".split())
        switches = "echo 1 > ip_forward; for f in conf/*/rp_filter; do echo 0 > $f; done"
        _sh(*self.at(self.router), "sh", "-c", f"cd /proc/sys/net/ipv4; {switches}")
        _sh(
            *f"ip link add {self._outside} type veth peer name outside netns {self.servers}".split()
        )
        _sh(*f"ip addr add 10.213.3.1/24 dev {self._outside}".split())
        _sh(*f"ip link set {self._outside} up".split())
        _sh(*f"ip -n {self.servers} addr add {SERVERS}/24 dev outside".split())
        _sh(*f"ip -n {self.servers} link set outside up".split())

    @staticmethod
    def _link(one: str, name: str, address: str, other: str, peer: str, its: str) -> None:
        _sh(*f"ip -n {one} link add {name} type veth peer name {peer} netns {other}".split())
        for namespace, device, at in ((one, name, address), (other, peer, its)):
            _sh(*f"ip -n {namespace} addr add {at} dev {device}".split())
            _sh(*f"ip -n {namespace} link set {device} up".split())

    def _routes(self, words: str) -> None:
        _sh("ip", "-n", self.router, *words.split())

    def _remove(self) -> None:
        for name in (self.workers, self.router, self.servers):
            with contextlib.suppress(subprocess.CalledProcessError):
                _sh("ip", "netns", "del", name)
        with contextlib.suppress(subprocess.CalledProcessError):  # goes with its peer, in a while
            _sh("ip", "link", "del", self._outside)


def _sh(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
