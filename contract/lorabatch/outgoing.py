"""Where the server may connect to when somebody else gave the URL: names, ports and addresses.

    target = parse_url(url)                     # its one reading; nothing parses it again
    check_target(target, rules)                 # scheme, port and literal addresses
    addresses = vetted(target, rules, infos)    # what its name was resolved to, once

The connection must go to one of these addresses, and not by the name: it may mean another one by
then. Addresses inside addresses (IPv4-mapped, NAT64, 6to4, Teredo) are refused, whatever is inside.
Raises ValueError, which names no address that was resolved.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Annotated, Any

from pydantic import AfterValidator, StringConstraints

__all__ = ["OutgoingUrl", "Rules", "Target", "check_target", "parse_url", "vetted"]

MAX_CHARS = 2048
MAX_HOST_CHARS = 253
PORTS = {"https": 443, "http": 80}
# What is not written here has no place in a URL of ours: no user, backslash, fragment or control
# character, and a name only in ASCII, as DNS has it.
_URL = re.compile(
    r"(?P<scheme>https?)://(?:(?P<name>[A-Za-z0-9._-]+)|\[(?P<six>[0-9A-Fa-f:.]+)\])"
    r"(?::(?P<port>[0-9]{1,5}))?(?P<path>/[!$-;=?-Z_a-z~]*)?",
    re.ASCII,
)
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_LAST = re.compile(
    r"[A-Za-z]([A-Za-z0-9-]*[A-Za-z0-9])?"
)  # no number: 0x7f.1 is an address to some
_UNICAST = ip_network("2000::/3")
_NOT_PUBLIC = [
    ip_network(text)
    for text in (
        *(
            "192.0.0.0/24",
            "192.88.99.0/24",
            "168.63.129.16/32",
        ),  # a cloud's own, though it is public
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
]
_PRIVATE = [
    ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "::1", "fc00::/7")
]


@dataclass(frozen=True)
class Rules:
    """`private`: addresses of this machine and of private networks are allowed too, and http to
    this machine. `ports`: which; none: any."""

    private: bool = False
    ports: tuple[int, ...] = (443,)


@dataclass(frozen=True)
class Target:
    """A URL that was read. `host`: in small letters, without brackets; `path`: with its query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def netloc(self) -> str:
        """As the Host header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


def parse_url(url: str) -> Target:
    """The parts of an http or https URL."""
    found = _URL.fullmatch(url) if len(url) <= MAX_CHARS else None
    if found is None:
        raise ValueError(
            f"wanted https://HOST[:PORT][/PATH] in ASCII, at most {MAX_CHARS} characters, without "
            "a user, a fragment, a backslash or a space; percent-encode what is in the path"
        )
    host = (found["name"] or found["six"]).lower().removesuffix(".")
    port = int(found["port"] or PORTS[found["scheme"]])
    if not 0 < port < 65_536:
        raise ValueError(f"wanted a port from 1 to 65535, not {port}")
    if _literal(host) is None and not _is_name(host):
        raise ValueError("wanted a host that is a DNS name or an address as it is usually written")
    return Target(found["scheme"], host, port, found["path"] or "/")


def check_target(target: Target, rules: Rules) -> None:
    """Raise ValueError for what may not be connected to, whatever its name stands for."""
    if target.scheme != "https" and not rules.private:
        raise ValueError("wanted https, not http")
    if rules.ports and target.port not in rules.ports:
        wanted = ", ".join(map(str, rules.ports))
        raise ValueError(f"wanted port {wanted}, not {target.port} (LORABATCH_WEBHOOK_PORTS)")
    address = _literal(target.host)
    if address is not None:
        _check_address(address, target, rules)


def vetted(target: Target, rules: Rules, infos: Iterable[tuple[Any, ...]]) -> list[str]:
    """The addresses to connect to, of what `socket.getaddrinfo` answered: if any of them is refused
    all are, for a name that has both kinds is up to something."""
    check_target(target, rules)
    found = list(dict.fromkeys(str(info[4][0]) for info in infos))
    if not found:
        raise ValueError("the host has no address")
    for text in found:
        address = _literal(text)
        if address is None:
            raise ValueError("the host has an address of a kind that is not known")
        _check_address(address, target, rules)
    return found


def _check_address(address: IPv4Address | IPv6Address, target: Target, rules: Rules) -> None:
    private = any(address in network for network in _PRIVATE)
    if target.scheme == "http" and not address.is_loopback:
        raise ValueError("wanted https: http is for this machine alone")
    if private and not rules.private:
        raise ValueError("the host is on a private network (LORABATCH_WEBHOOK_PRIVATE allows it)")
    if not private and not _is_public(address):
        raise ValueError("the host's address is not one of the public internet")


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address) and address not in _UNICAST:
        return False
    if any(address in network for network in _NOT_PUBLIC):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _literal(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _is_name(host: str) -> bool:
    labels = host.split(".")
    known = len(host) <= MAX_HOST_CHARS and all(map(_LABEL.fullmatch, labels))
    return known and _LAST.fullmatch(labels[-1]) is not None


def _outgoing(url: str) -> str:
    parse_url(url)
    return url


OutgoingUrl = Annotated[str, StringConstraints(max_length=MAX_CHARS), AfterValidator(_outgoing)]
"""A URL that can be read; whether it may be connected to is for a server's rules to say."""
