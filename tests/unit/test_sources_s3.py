"""Adapters from an S3 store: moto's server, and a proxy before it that cuts connections."""

from __future__ import annotations

import builtins
import random
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from lorabatch import Settings
from lorabatch.errors import AdapterUnavailable, InvalidAdapter, UnknownAdapter
from lorabatch.location import Location
from lorabatch_worker.adapters import attempts
from lorabatch_worker.adapters.sources import Fetcher
from tests.cutting_proxy import CuttingProxy

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SQL = Location("s3", "adapters", prefix="acme/sql")
FILES = {CONFIG: b'{"r": 4}', WEIGHTS: random.Random(0).randbytes(300_000)}
CUT_BYTES = 150_000


class Store:
    """A bucket of one adapter, and how to change it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = boto3.session.Session().client("s3", endpoint_url=url)
        self.client.create_bucket(Bucket="adapters")
        for name, body in FILES.items():
            self.put(f"acme/sql/{name}", body)
        self.put("acme/sql/README.md", b"not asked for")
        self.put("acme/sql/checkpoint-1/adapter_config.json", b"of another")
        self.put("acme/sql-2/adapter_config.json", b"of another")

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket="adapters", Key=key, Body=body)

    def admit(self, unchecked: str) -> None:
        """How many more requests are let in by any credentials: 0 or inf."""
        url, kind = f"{self.url}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        with urllib.request.urlopen(urllib.request.Request(url, unchecked.encode(), kind)):
            pass


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadedMotoServer]:
    made = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def store(server: ThreadedMotoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(attempts, "FIRST_DELAY_S", 0.01)
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    with urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", b"")):
        pass
    return Store(url)


@pytest.fixture
def proxy(
    store: Store, server: ThreadedMotoServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CuttingProxy]:
    """What AWS_ENDPOINT_URL names."""
    made = CuttingProxy(server.get_host_and_port()[1])
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    yield made
    made.close()


def fetcher(home: Path, **more: Any) -> Fetcher:
    return Fetcher(Settings.load(home=home, **more))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_files_come_and_nothing_else(proxy: CuttingProxy, home: Path, into: Path) -> None:
    found = fetcher(home)
    assert found.pin(SQL, "") == SQL
    found.fetch(SQL, "", into)
    assert content(into) == FILES


def test_a_whole_bucket_may_be_an_adapter(
    proxy: CuttingProxy, store: Store, home: Path, into: Path
) -> None:
    store.put(CONFIG, b"{}")
    fetcher(home).fetch(Location.parse("s3://adapters"), "", into)
    assert content(into) == {CONFIG: b"{}"}


@pytest.mark.parametrize("where", ["s3://nowhere/acme/sql", "s3://adapters/acme/none"])
def test_what_is_not_there_is_unknown(
    proxy: CuttingProxy, home: Path, into: Path, where: str
) -> None:
    with pytest.raises(UnknownAdapter, match=f"{where}: there is no adapter that may be read"):
        fetcher(home).fetch(Location.parse(where), "", into)
    assert proxy.heard.count(b"GET ") == 1


def test_wrong_credentials_say_the_same(
    proxy: CuttingProxy, store: Store, home: Path, into: Path
) -> None:
    sentences = set()
    for unchecked in ("inf", "0"):
        store.admit(unchecked)
        with pytest.raises(UnknownAdapter) as caught:
            fetcher(home).fetch(Location("s3", "adapters", prefix="none"), "", into)
        sentences.add(str(caught.value))
    with pytest.raises(UnknownAdapter):
        fetcher(home).fetch(SQL, "", into)
    store.admit("inf")
    assert len(sentences) == 1


def test_no_credentials_name_the_variables(
    proxy: CuttingProxy, home: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AdapterUnavailable, match="no AWS credentials: set AWS_ACCESS_KEY_ID"):
        fetcher(home).fetch(SQL, "", into)


def test_without_boto3_the_extra_is_named(
    home: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name.partition(".")[0] in ("boto3", "botocore"):
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(AdapterUnavailable, match=r"pip install 'lorabatch\[s3\]'"):
        fetcher(home).fetch(SQL, "", into)


def test_what_was_cut_goes_on_from_there(proxy: CuttingProxy, home: Path, into: Path) -> None:
    proxy.cut_after = CUT_BYTES
    fetcher(home).fetch(SQL, "", into)
    assert content(into) == FILES
    whole, rest = proxy.asked(WEIGHTS)
    assert whole is None
    assert rest is not None
    assert 0 < int(rest.removeprefix("bytes=").rstrip("-")) < CUT_BYTES
    assert proxy.asked(CONFIG) == [None]


def test_another_call_goes_on_too(proxy: CuttingProxy, home: Path, into: Path) -> None:
    proxy.cut_after = CUT_BYTES
    with pytest.raises(AdapterUnavailable, match="1 attempts failed"):
        fetcher(home, adapter_fetch_attempts=1).fetch(SQL, "", into)
    fetcher(home).fetch(SQL, "", into)
    assert content(into) == FILES
    assert len([span for span in proxy.asked(WEIGHTS) if span]) == 1


def test_what_changed_meanwhile_is_fetched_anew(
    proxy: CuttingProxy, store: Store, home: Path, into: Path
) -> None:
    proxy.cut_after = CUT_BYTES
    with pytest.raises(AdapterUnavailable):
        fetcher(home, adapter_fetch_attempts=1).fetch(SQL, "", into)
    other = FILES[WEIGHTS][::-1]
    store.put(f"acme/sql/{WEIGHTS}", other)
    fetcher(home).fetch(SQL, "", into)
    assert content(into) == {**FILES, WEIGHTS: other}
    assert proxy.asked(WEIGHTS) == [None, None]


@pytest.mark.parametrize("cut", [None, CUT_BYTES])
def test_a_change_under_way_never_mixes_two_objects(
    proxy: CuttingProxy, store: Store, home: Path, into: Path, cut: int | None
) -> None:
    other = FILES[WEIGHTS][::-1]
    asked = []

    def change(request: bytes) -> None:
        """Before the file's first request, or before that for the rest of it."""
        if WEIGHTS.encode() in request:
            asked.append(request)
            if len(asked) == (2 if cut else 1):
                store.put(f"acme/sql/{WEIGHTS}", other)

    proxy.cut_after, proxy.on_request = cut, change
    fetcher(home).fetch(SQL, "", into)
    assert content(into) == {**FILES, WEIGHTS: other}


def test_too_large_is_refused_before_anything_comes(
    proxy: CuttingProxy, home: Path, into: Path
) -> None:
    with pytest.raises(InvalidAdapter, match=r"300,008 bytes, allowed 1,000: raise LORABATCH_ADA"):
        fetcher(home, adapter_max_bytes=1000).fetch(SQL, "", into)
    assert not proxy.asked(CONFIG) + proxy.asked(WEIGHTS)


def test_a_prefix_without_an_adapter_is_refused(
    proxy: CuttingProxy, store: Store, home: Path, into: Path
) -> None:
    store.put(f"half/{WEIGHTS}", b"x")
    with pytest.raises(InvalidAdapter, match=r"s3://adapters/half: it holds no adapter_config"):
        fetcher(home).fetch(Location.parse("s3://adapters/half"), "", into)


def test_a_dead_store_is_given_up(
    store: Store, proxy: CuttingProxy, home: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.close()
    with pytest.raises(AdapterUnavailable) as caught:
        fetcher(home, adapter_fetch_attempts=2).fetch(SQL, "", into)
    assert "2 attempts failed, the last with EndpointConnectionError" in str(caught.value)
    assert "hunter2" not in str(caught.value)
