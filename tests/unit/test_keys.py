"""Keys: what is kept of them, which are right, and that a wrong one is not told apart by what is
done with it."""

from __future__ import annotations

import secrets
from typing import Any

import pytest
import sqlalchemy as sa

from lorabatch import Settings, keys
from lorabatch.http_tables import api_keys
from lorabatch.keys import DEFAULT_SCOPES, USE_NOTED_US, Keys, keys_wanted


@pytest.fixture
def known(database: sa.Engine) -> Keys:
    return Keys(database)


def change(database: sa.Engine, key_id: str, **values: int) -> None:
    with database.begin() as connection:
        mine = api_keys.c.key_id == key_id
        connection.execute(sa.update(api_keys).where(mine).values(values))


def test_a_key_is_right_and_the_database_cannot_say_it(known: Keys, database: sa.Engine) -> None:
    key, text = known.create("acme", "their shop", ["read", "generate"], expires_s=60.0)
    other, other_text = known.create("globex")
    assert known.check(text) == key
    assert (key.tenant, key.name, key.scopes) == ("acme", "their shop", ("generate", "read"))
    assert key.expires_us == key.created_us + 60_000_000
    assert (other.scopes, other.expires_us) == (DEFAULT_SCOPES, None)
    assert [found.key_id for found in known.list()] == [key.key_id, other.key_id]
    assert [found.key_id for found in known.list("globex")] == [other.key_id]
    with database.connect() as connection:
        rows = str(connection.execute(sa.select(api_keys)).all())
    for said in (text, other_text):
        prefix, key_id, secret = said.split("-", 2)
        assert (prefix, len(secret)) == ("lb", 43)
        assert key_id in rows
        assert secret not in rows


def test_what_is_not_the_key_is_nobodys(known: Keys) -> None:
    key, text = known.create("acme")
    _, other = known.create("globex")
    secret = text.split("-", 2)[2]
    strange = ["", "lb-", text[:-1], text + "A", text.upper(), f" {text}", f"{text}\n", "é" * 59]
    swapped = f"lb-{key.key_id}-{other.split('-', 2)[2]}"
    unknown = f"lb-{'0' * 12}-{secret}"
    assert [known.check(one) for one in (*strange, swapped, unknown)] == [None] * 10
    assert known.check(text) == key


def test_an_unknown_id_takes_the_same_path_as_a_wrong_secret(
    known: Keys, database: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, _ = known.create("acme")
    done: list[str] = []
    sa.event.listen(
        database, "before_cursor_execute", lambda c, cursor, sql, *rest: done.append(sql)
    )
    real = secrets.compare_digest

    def comparing(a: Any, b: Any) -> bool:
        done.append(f"compared {len(a)} with {len(b)}")
        return real(a, b)

    monkeypatch.setattr(keys.secrets, "compare_digest", comparing)
    paths = []
    for key_id in (key.key_id, "0" * 12):
        done.clear()
        assert known.check(f"lb-{key_id}-{'A' * 43}") is None
        paths.append(list(done))
    assert paths[0] == paths[1]
    assert paths[0][-1] == "compared 64 with 64"


def test_a_key_ends(known: Keys, database: sa.Engine) -> None:
    assert not known.known()
    (short, short_text), (long, long_text) = known.create("a", expires_s=60), known.create("a")
    change(database, short.key_id, expires_us=short.created_us)
    assert known.check(short_text) is None
    assert known.check(long_text) == long
    assert known.usable()
    revoked = known.revoke(long.key_id)
    assert revoked is not None
    assert revoked.revoked_us is not None
    assert known.revoke(long.key_id) == revoked
    assert known.check(long_text) is None
    assert known.revoke("none") is None
    assert [key.valid for key in known.list()] == [False, False]
    assert not known.usable()
    assert known.known(), "nothing opens again because the last key has ended"


def test_its_last_use_is_noted_now_and_then(known: Keys, database: sa.Engine) -> None:
    key, text = known.create("acme")
    last = []
    for ago_us in (0, USE_NOTED_US // 2, USE_NOTED_US * 2):
        known.check(text)
        (found,) = known.list()
        assert found.last_used_us is not None
        last.append(found.last_used_us)
        change(database, key.key_id, last_used_us=found.last_used_us - ago_us)
    known.check(text)
    last.append(known.list()[0].last_used_us or 0)
    assert last[0] == last[1]
    assert last[2] == last[1] - USE_NOTED_US // 2
    assert last[3] >= last[0] > key.created_us - 1


@pytest.mark.parametrize(
    ("mode", "host", "wanted"),
    [
        ("auto", "127.0.0.1", None),
        ("auto", "localhost", None),
        ("auto", "::1", None),
        ("auto", "0.0.0.0", True),
        ("auto", "::", True),
        ("auto", "10.0.0.7", True),
        ("auto", "here.example", True),
        ("on", "127.0.0.1", True),
        ("off", "10.0.0.7", False),
    ],
)
def test_when_keys_are_wanted(settings: Settings, mode: str, host: str, wanted: bool) -> None:
    said = settings.model_copy(update={"http_keys": mode, "http_host": host})
    assert keys_wanted(said) is wanted
