"""Which URLs and addresses may be connected to when somebody else gave them."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from lorabatch.outgoing import Rules, check_target, parse_url, vetted

ANY_PORT = Rules(ports=())
PRIVATE = Rules(private=True, ports=())
BAD_URLS = [
    *("", "hooks", "//host/x", "ftp://host/", "file:///etc/passwd", "gopher://h/", "javascript:x"),
    *("https://user@host/", "https://user:pass@host/", "https://a\\@b/", "http://a\\@b"),
    *("https://host\\x/", "https://ho st/", "https://host/a b", "https://host/\r\nX: y"),
    *("https://host/\x00", "https://host/\x7f", "\x00https://host/", "https://host/é"),
    *("https://höst/", "https://host/#part", "https://host:0/", "https://host:65536/"),
    *("https://host:x/", "https://host:/x", "https://:443/", "https:///x", "https://.host/"),
    *("https://a..b/", "https://-a.b/", f"https://{'a' * 64}.b/", f"https://{'a.' * 127}b/"),
    *("https://0x7f.1/", "https://2130706433/", "https://0177.0.0.1/", "https://127.1/"),
    *("https://[::1/", "https://::1/", "https://[fe80::1%25eth0]/", "https://[v1.x]/"),
    *("https://host?x", "https://host/[x]", f"https://host/{'a' * 2048}", "https://host/\n"),
]
NOT_PUBLIC = [
    *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255"),
    *("192.168.1.1", "100.64.0.1", "100.100.100.200", "169.254.169.254", "169.254.0.1"),
    *("168.63.129.16", "192.0.0.192", "192.0.2.1", "192.88.99.1", "198.18.0.1", "198.51.100.1"),
    *("203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:169.254.169.254", "::127.0.0.1"),
    *("64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "2002:7f00:1::", "2002:808:808::"),
    *("2001::1", "2001:0:7f00:1::", "2001:db8::1", "3fff::1", "fe80::1", "fec0::1", "fc00::1"),
    *("fd00:ec2::254", "ff02::1", "100::1", "5f00::1", "fe80::1%2"),
]
PUBLIC = ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450::1"]


def infos(*addresses: str) -> list[tuple[Any, ...]]:
    """As `socket.getaddrinfo` answers."""
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (text, 443)) for text in addresses]


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_url_that_could_be_read_in_two_ways_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="^wanted "):
        parse_url(url)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("https://Hooks.Example/a?b=c&d=%20", ("https", "hooks.example", 443, "/a?b=c&d=%20")),
        ("https://hooks.example.:8443", ("https", "hooks.example", 8443, "/")),
        ("http://127.0.0.1:80/x", ("http", "127.0.0.1", 80, "/x")),
        ("https://[2606:4700::1]:444/", ("https", "2606:4700::1", 444, "/")),
        ("https://xn--hst-sna.example/~a@b", ("https", "xn--hst-sna.example", 443, "/~a@b")),
    ],
)
def test_a_url_is_read_once(url: str, parts: tuple[Any, ...]) -> None:
    target = parse_url(url)
    assert (target.scheme, target.host, target.port, target.path) == parts


def test_the_host_header() -> None:
    said = {
        "https://h.x/": "h.x",
        "https://h.x:8443/": "h.x:8443",
        "https://[2a00::1]/": "[2a00::1]",
    }
    assert {url: parse_url(url).netloc for url in said} == said


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    target = parse_url("https://hooks.example/")
    for found in (infos(address), infos("8.8.8.8", address), infos(address, "8.8.8.8")):
        with pytest.raises(ValueError, match="private network|not one of the public") as caught:
            vetted(target, ANY_PORT, found)
        assert address not in str(caught.value)


@pytest.mark.parametrize("address", [a for a in NOT_PUBLIC if "%" not in a])
def test_a_literal_address_is_refused_before_anybody_is_asked(address: str) -> None:
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(ValueError, match="private network|not one of the public"):
        check_target(parse_url(f"https://{host}/"), ANY_PORT)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_connected_to(address: str) -> None:
    target = parse_url("https://hooks.example/")
    assert vetted(target, Rules(), [*infos(address), *infos(address)]) == [address]


def test_private_addresses_where_they_are_allowed() -> None:
    target = parse_url("https://hooks.example:9443/")
    allowed = ["127.0.0.1", "::1", "10.1.2.3", "192.168.0.9", "172.20.0.1", "fd12::1", "8.8.8.8"]
    assert vetted(target, PRIVATE, infos(*allowed)) == allowed
    for never in ("169.254.169.254", "0.0.0.0", "::", "fe80::1", "::ffff:127.0.0.1", "224.0.0.1"):
        with pytest.raises(ValueError, match="not one of the public"):
            vetted(target, PRIVATE, infos(never))


def test_http_is_for_this_machine_alone_and_only_where_private_addresses_are_allowed() -> None:
    target = parse_url("http://hooks.example/")
    assert vetted(target, PRIVATE, infos("127.0.0.1", "::1")) == ["127.0.0.1", "::1"]
    for address in ("10.0.0.1", "8.8.8.8"):
        with pytest.raises(ValueError, match="https"):
            vetted(target, PRIVATE, infos(address))
    with pytest.raises(ValueError, match="wanted https, not http"):
        check_target(target, ANY_PORT)


def test_ports_are_those_that_are_allowed() -> None:
    for rules, url in ((Rules(), "https://h.x:8443/"), (Rules(ports=(1, 2)), "https://h.x/")):
        with pytest.raises(ValueError, match="wanted port .*LORABATCH_WEBHOOK_PORTS"):
            check_target(parse_url(url), rules)
    check_target(parse_url("https://h.x:8443/"), Rules(ports=(443, 8443)))
    check_target(parse_url("https://h.x:1234/"), ANY_PORT)


def test_a_host_without_a_known_address_is_refused() -> None:
    target = parse_url("https://hooks.example/")
    for found in ([], infos("nonsense")):
        with pytest.raises(ValueError, match="the host has"):
            vetted(target, Rules(), found)
