"""Where adapters are: what people write, what is stored, and local folders under roots."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from lorabatch import Settings
from lorabatch.errors import InvalidAdapter, SettingsError, UnknownAdapter
from lorabatch.location import Location
from lorabatch.settings import PREFIX
from lorabatch_worker.adapters import attempts, source_folder
from lorabatch_worker.adapters.sources import Fetcher
from tests.bad_adapters import write

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# -- what people write --------------------------------------------------------

GOOD = [
    ("/srv/sql", Location("folder", "/srv/sql"), "/srv/sql"),
    ("/srv/x/../a b@c", Location("folder", "/srv/a b@c"), "/srv/a b@c"),
    ("file:///srv/sql", Location("folder", "/srv/sql"), "/srv/sql"),
    ("file:///srv/a%20b%23c", Location("folder", "/srv/a b#c"), "/srv/a b#c"),
    ("file://localhost/srv", Location("folder", "/srv"), "/srv"),
    ("acme/sql", Location("hub", "acme/sql"), "hub:acme/sql"),
    ("acme/sql@v1", Location("hub", "acme/sql", "v1"), "hub:acme/sql@v1"),
    ("hub:acme/sql@refs/pr/1", Location("hub", "acme/sql", "refs/pr/1"), "hub:acme/sql@refs/pr/1"),
    ("hub:sql", Location("hub", "sql"), "hub:sql"),
    ("s3://bkt/acme/sql/", Location("s3", "bkt", prefix="acme/sql"), "s3://bkt/acme/sql"),
    ("s3://bkt/a@b=c:d e", Location("s3", "bkt", prefix="a@b=c:d e"), "s3://bkt/a@b=c:d e"),
    ("s3://bkt", Location("s3", "bkt"), "s3://bkt"),
]
BAD = [
    *(
        "",
        "sql",
        "a/b/c",
        "a/b@",
        "a/b@..",
        "a/b@x/../y",
        "a/../b",
        "-a/b",
        "a/b\n",
        "a\x00b",
        "a b",
    ),
    *("hub:", "hub:/etc", "hub:a/b/c", "hub:../x", "http://host/x", "https://huggingface.co/a/b"),
    *(
        "s3:",
        "s3:bkt/x",
        "s3://",
        "s3:///x",
        "s3://b/x",
        "s3://bkt/../x",
        "s3://bkt/a//b",
        "s3://.b.",
    ),
    *("file:", "file:x", "file://host/x", "file:/x\n", "~no-such-user-here/x", "gs://bkt/x"),
]


@pytest.mark.parametrize(("text", "location", "stored"), GOOD)
def test_a_location_parses_back_to_itself(text: str, location: Location, stored: str) -> None:
    assert Location.parse(text) == location
    assert str(location) == stored
    assert Location.parse(stored) == location


@pytest.mark.parametrize("text", BAD)
def test_anything_else_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"wanted|neither|not a|holds") as caught:
        Location.parse(text)
    assert "\n" not in str(caught.value)


def test_relative_folders_are_those_of_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("./sql", f"../{tmp_path.name}/sql", "~/sql"):
        assert Location.parse(text) == Location("folder", str(tmp_path / "sql"))


@pytest.mark.parametrize(
    "text", ["s3://key:hunter2@bkt/x", "s3://key:hun/ter2@bkt/x", "https://u:hunter2@host/a"]
)
def test_a_password_is_not_repeated(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\*\*\*@") as caught:
        Location.parse(text)
    assert "ter2" not in str(caught.value)
    with pytest.raises(SettingsError) as shown:
        Settings.load(home=tmp_path, adapters=f"a={text}")
    assert "ter2" not in str(shown.value)


# -- settings -----------------------------------------------------------------


def test_configured_adapters_have_locations(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    text = "a=s3://bkt/x=y/z@1,b=mine,c/d@v1,e=hub:f/g@v2,h=file:///srv/h,i=/srv/i,gpt2"
    found = Settings.load(home=home, adapters=text).adapters
    assert {source.name: str(source.where) for source in found} == {
        "a": "s3://bkt/x=y/z@1",
        "b": str(tmp_path / "mine"),
        "c/d": "hub:c/d@v1",
        "e": "hub:f/g@v2",
        "h": "/srv/h",
        "i": "/srv/i",
        "gpt2": "hub:gpt2",
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ADAPTERS", "s3://bkt/x", "a name is wanted before it; write NAME=s3://bkt/x"),
        ("ADAPTERS", "../a=s3://bkt/x", "a name is wanted before it"),
        ("ADAPTERS", "a=s3://b", "wanted s3://bucket/prefix, without credentials"),
        ("ADAPTERS", "a=hub:x/y/z", "is neither a folder"),
        ("ADAPTER_DISK_BYTES", "5", "LORABATCH_ADAPTER_DISK_BYTES: "),
        ("ADAPTER_MAX_BYTES", "0", "LORABATCH_ADAPTER_MAX_BYTES: "),
        ("ADAPTER_FETCH_TIMEOUT_S", "0", "LORABATCH_ADAPTER_FETCH_TIMEOUT_S: "),
        ("ADAPTER_FETCH_ATTEMPTS", "0", "LORABATCH_ADAPTER_FETCH_ATTEMPTS: "),
    ],
)
def test_a_bad_setting_is_refused_by_its_name(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(SettingsError) as caught:
        Settings.load(home=home)
    assert message in str(caught.value)


def test_folders_in_settings_are_absolute(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORABATCH_ADAPTER_ROOTS", "a, /srv/b,")
    monkeypatch.setenv("LORABATCH_HUB_TOKEN_FOLDER", "tokens")
    settings = Settings.load(home=home)
    assert settings.adapter_roots == (tmp_path / "a", Path("/srv/b"))
    assert settings.hub_token_folder == tmp_path / "tokens"


# -- local folders ------------------------------------------------------------


@pytest.fixture
def sql(tmp_path: Path) -> Path:
    folder = tmp_path / "root" / "sql"
    write(folder)
    (folder / "training.log").write_text("not asked for")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fetch(home: Path, folder: Path, into: Path, **more: Any) -> None:
    fetcher = Fetcher(Settings.load(home=home, **more))
    location = Location("folder", str(folder))
    assert fetcher.pin(location, "acme") == location
    fetcher.fetch(location, "acme", into)


def test_a_folders_files_are_copied_and_nothing_else(home: Path, sql: Path, tmp_path: Path) -> None:
    into = tmp_path / "into"
    into.mkdir()
    (into / "chat_template.jinja").write_text("of another")
    fetch(home, sql, into)
    assert content(into) == {name: content(sql)[name] for name in (CONFIG, WEIGHTS)}


@pytest.mark.parametrize("place", ["root/sql", "root", "root/link/sql"])
def test_a_folder_may_be_or_lie_in_a_root(
    place: str, home: Path, sql: Path, tmp_path: Path
) -> None:
    (tmp_path / "root" / "link").symlink_to(tmp_path / "root")
    write(tmp_path / "root")
    roots = f"{tmp_path}/elsewhere,{tmp_path}/root"
    fetch(home, tmp_path / place, tmp_path / "into", adapter_roots=roots)
    assert (tmp_path / "into" / WEIGHTS).is_file()


@pytest.mark.parametrize("place", ["outside", "root/link", "root/../outside", "nowhere", "root-2"])
def test_outside_of_the_roots_is_refused_whether_it_exists_or_not(
    place: str, home: Path, sql: Path, tmp_path: Path
) -> None:
    write(tmp_path / "outside")
    write(tmp_path / "root-2")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(InvalidAdapter, match=r"outside of LORABATCH_ADAPTER_ROOTS, which allows /"):
        fetch(home, tmp_path / place, tmp_path / "into", adapter_roots=f"{tmp_path}/root")
    assert not list((tmp_path / "into").iterdir())


@pytest.mark.parametrize("rooted", [True, False])
def test_a_file_that_leads_elsewhere_is_refused(
    rooted: bool, home: Path, sql: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("hunter2")
    (sql / "chat_template.jinja").symlink_to(tmp_path / "secret")
    roots = f"{tmp_path}/root" if rooted else ""
    with pytest.raises(InvalidAdapter, match=r"chat_template\.jinja is a symlink that leads out"):
        fetch(home, sql, tmp_path / "into", adapter_roots=roots)
    assert not list((tmp_path / "into").iterdir())


def test_a_symlink_within_the_root_is_followed(home: Path, sql: Path, tmp_path: Path) -> None:
    (sql / WEIGHTS).rename(tmp_path / "root" / "blob")
    (sql / WEIGHTS).symlink_to("../blob")
    fetch(home, sql, tmp_path / "into", adapter_roots=f"{tmp_path}/root")
    assert not (tmp_path / "into" / WEIGHTS).is_symlink()
    assert content(tmp_path / "into")[WEIGHTS] == (tmp_path / "root" / "blob").read_bytes()
    with pytest.raises(InvalidAdapter, match="leads out"):
        fetch(home, sql, tmp_path / "into")


def test_too_large_is_refused_before_it_is_copied(home: Path, sql: Path, tmp_path: Path) -> None:
    os.truncate(sql / WEIGHTS, 1 << 40)  # a hole: takes no room
    with pytest.raises(InvalidAdapter, match=r"allowed 17,179,869,184: raise LORABATCH_ADAPTER_M"):
        fetch(home, sql, tmp_path / "into")
    assert not list((tmp_path / "into").iterdir())


def test_a_pipe_is_refused_and_not_waited_for(home: Path, sql: Path, tmp_path: Path) -> None:
    (sql / WEIGHTS).unlink()
    os.mkfifo(sql / WEIGHTS)
    with pytest.raises(InvalidAdapter, match=f"{WEIGHTS} is not a regular file"):
        fetch(home, sql, tmp_path / "into")


def test_a_folder_that_is_not_there_is_unknown(home: Path, sql: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownAdapter, match=f"{tmp_path}/gone: there is no adapter"):
        fetch(home, tmp_path / "gone", tmp_path / "into")


def test_a_folder_without_an_adapter_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidAdapter, match=r"holds no adapter_config\.json"):
        fetch(home, tmp_path / "empty", tmp_path / "into")


def test_a_file_that_changes_meanwhile_is_copied_again(
    home: Path, sql: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer appends while the first piece of it is copied."""
    monkeypatch.setattr(attempts, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(source_folder, "PIECE_BYTES", 64)
    real, written = attempts.Deadline.check, []

    def write_then_check(self: attempts.Deadline, last: str = "") -> None:
        if (tmp_path / "into" / WEIGHTS).exists() and not written:
            written.append(True)
            with (sql / WEIGHTS).open("ab") as file:
                file.write(b"more")
        real(self, last)

    monkeypatch.setattr(attempts.Deadline, "check", write_then_check)
    fetch(home, sql, tmp_path / "into")
    assert written
    assert content(tmp_path / "into")[WEIGHTS] == (sql / WEIGHTS).read_bytes()


def test_a_full_disk_is_not_tried_again() -> None:
    """/dev/full says that it is full to whoever writes."""
    tried = []

    def fill() -> None:
        tried.append(True)
        Path("/dev/full").write_bytes(b"x")

    deadline = attempts.Deadline(60, threading.Event())
    with pytest.raises(attempts.Failed, match="No space left on device"):
        attempts.until_it_comes(fill, 4, deadline, "here")
    assert tried == [True]
