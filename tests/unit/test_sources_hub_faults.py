"""A Hub that fails: cut, busy, wrong, silent, slow, dead. A real server answers, or does not."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import huggingface_hub.constants
import pytest

from lorabatch import Settings
from lorabatch.errors import AdapterUnavailable, InvalidAdapter, UnknownAdapter
from lorabatch.location import Location
from lorabatch_worker.adapters import attempts
from lorabatch_worker.adapters.sources import Fetcher
from tests.hub_server import (
    CONFIG,
    MAIN,
    OLD,
    SHARED,
    SQL,
    WEIGHTS,
    HubServer,
    ask,
    content,
    fetcher,
    sibling,
    wanted,
)


def test_what_was_cut_goes_on_from_there(hub: HubServer, home: Path, into: Path) -> None:
    hub.cut_after = 1000
    fetcher(home).fetch(SQL, SHARED, into)
    assert content(into) == wanted(hub)
    assert hub.ranges(WEIGHTS) == [None, "bytes=1000-"]


def test_another_call_goes_on_too_and_fetches_nothing_twice(
    hub: HubServer, home: Path, into: Path
) -> None:
    once = fetcher(home, adapter_fetch_attempts=1)
    hub.cut_after = 1000
    with pytest.raises(AdapterUnavailable, match=r"hub:acme/sql did not come: 1 attempts failed"):
        once.fetch(SQL, SHARED, into)
    fetcher(home, adapter_fetch_attempts=1).fetch(SQL, SHARED, into)
    assert content(into) == wanted(hub)
    assert hub.ranges(WEIGHTS) == [None, "bytes=1000-"]
    assert hub.ranges(CONFIG) == [None]


def test_what_was_cut_of_another_commit_is_not_gone_on_with(
    hub: HubServer, home: Path, into: Path
) -> None:
    once = fetcher(home, adapter_fetch_attempts=1)
    hub.cut_after = 1000
    with pytest.raises(AdapterUnavailable):
        once.fetch(SQL, SHARED, into)
    once.fetch(Location("hub", "acme/sql", "v1"), SHARED, into)
    assert content(into) == wanted(hub, OLD)
    assert hub.ranges(WEIGHTS) == [None, None]


@pytest.mark.parametrize("statuses", [[503, 503], [429], [500, 408]])
def test_passing_faults_are_waited_out(
    hub: HubServer, home: Path, into: Path, statuses: list[int]
) -> None:
    hub.statuses = list(statuses)
    fetcher(home).fetch(SQL, SHARED, into)
    assert content(into) == wanted(hub)
    hub.statuses = list(statuses)
    assert fetcher(home).pin(SQL, SHARED).revision == MAIN


def test_it_is_tried_as_often_as_told_and_no_more(hub: HubServer, home: Path) -> None:
    hub.statuses = [503] * 9
    with pytest.raises(AdapterUnavailable, match=r"3 attempts failed, the last with .*HTTP 503"):
        fetcher(home, adapter_fetch_attempts=3).pin(SQL, SHARED)
    assert len(hub.asked) == 3


@pytest.mark.parametrize("where", ["hub:acme/nothing", "hub:acme/sql@v9"])
def test_what_is_not_there_is_not_asked_for_again(
    hub: HubServer, home: Path, into: Path, where: str
) -> None:
    with pytest.raises(UnknownAdapter, match=where):
        fetcher(home).fetch(Location.parse(where), SHARED, into)
    assert len(hub.asked) == 1


def test_an_answer_that_makes_no_sense_is_final(hub: HubServer, home: Path) -> None:
    hub.statuses = [400]
    with pytest.raises(AdapterUnavailable, match=r"127\.0\.0\.1:\d+ answered HTTP 400"):
        fetcher(home).pin(SQL, SHARED)
    assert len(hub.asked) == 1


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_wrong_digest_is_refused_at_once_and_nothing_of_it_stays(
    hub: HubServer, home: Path, into: Path, name: str
) -> None:
    if name == WEIGHTS:  # the config comes first
        fetcher(home, adapter_fetch_attempts=1).fetch(SQL, SHARED, into)
        (into / WEIGHTS).unlink()
        (into / f"{CONFIG}.tag").write_text(tag_of(hub, CONFIG))
    hub.spoil = True
    with pytest.raises(InvalidAdapter, match=rf"{name} came with digest (git|sha256):.*wanted"):
        fetcher(home).fetch(SQL, SHARED, into)
    assert not {name, f"{name}.part"} & set(content(into))


def tag_of(hub: HubServer, name: str) -> str:
    return f"{MAIN} git:{sibling(hub.folders[MAIN] / name)['blobId']}"


def test_too_large_is_refused_before_anything_comes(hub: HubServer, home: Path, into: Path) -> None:
    with pytest.raises(InvalidAdapter, match=r"bytes, allowed 1,000: raise LORABATCH_ADAPTER_MAX"):
        fetcher(home, adapter_max_bytes=1000).fetch(SQL, SHARED, into)
    assert not hub.ranges(WEIGHTS) + hub.ranges(CONFIG)


def test_a_repository_without_an_adapter_is_refused(hub: HubServer, home: Path, into: Path) -> None:
    (hub.folders[MAIN] / CONFIG).unlink()
    with pytest.raises(InvalidAdapter, match=r"hub:acme/sql: it holds no adapter_config\.json"):
        fetcher(home).fetch(SQL, SHARED, into)


def test_a_dead_hub_is_given_up(
    hub: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(f"http://user:hunter2@127.0.0.1:{closed_port()}", monkeypatch)
    with pytest.raises(AdapterUnavailable, match=r"2 attempts failed, .*ConnectError") as caught:
        fetcher(home, adapter_fetch_attempts=2).pin(SQL, SHARED)
    assert "hunter2" not in str(caught.value)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_hub_that_says_nothing_is_given_up(
    hub: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.hang.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    with pytest.raises(AdapterUnavailable, match=r"2 attempts failed, the last with ReadTimeout"):
        fetcher(home, adapter_fetch_attempts=2).pin(SQL, SHARED)


def test_a_file_that_comes_too_slowly_is_given_up(hub: HubServer, home: Path, into: Path) -> None:
    hub.trickle = True
    with pytest.raises(AdapterUnavailable, match=r"longer than 1 s; raise .*FETCH_TIMEOUT_S"):
        fetcher(home, adapter_fetch_timeout_s=1).fetch(SQL, SHARED, into)


def test_attempts_end_at_the_deadline(hub: HubServer, home: Path) -> None:
    hub.statuses = [503] * 100
    hub.retry_after = "3600"
    with pytest.raises(AdapterUnavailable, match=r"longer than 1 s \(the last fault was .* 503\)"):
        fetcher(home, adapter_fetch_timeout_s=1).pin(SQL, SHARED)
    assert len(hub.asked) == 1


def test_a_worker_that_stops_does_not_wait(
    hub: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "FIRST_DELAY_S", 1000.0)
    monkeypatch.setattr(attempts, "LONGEST_DELAY_S", 1000.0)
    hub.statuses = [503] * 100
    stop, ended = threading.Event(), []

    def run() -> None:
        with pytest.raises(AdapterUnavailable) as caught:
            Fetcher(Settings.load(home=home), stop).pin(SQL, SHARED)
        ended.append(str(caught.value))

    thread = threading.Thread(target=run)
    thread.start()
    while not hub.asked:
        threading.Event().wait(0.01)
    stop.set()
    thread.join(60)
    assert ended == ["hub:acme/sql did not come: the worker stops"]
