"""`lorabatch keys create|list|revoke`, and whom `lorabatch serve` lets in from other machines."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import uvicorn

from lorabatch import Ledger
from lorabatch.keys import Keys
from tests.command_line import Cli


def test_a_key_is_said_once(cli: Cli, ledger: Ledger) -> None:
    made = cli(
        "keys", "create", "--tenant", "acme", "--name", "their [red]shop", "--expires", "30d"
    )
    text = made.stdout.strip()
    key = Keys(ledger.engine).check(text)
    assert key is not None
    assert (key.tenant, key.scopes) == ("acme", ("generate", "read", "usage"))
    assert key.expires_us == key.created_us + 30 * 86_400 * 1_000_000
    assert f"key {key.key_id} of tenant acme, for generate, read, usage, until 2" in made.stderr
    assert text not in made.stderr
    table, lines = cli("keys", "list").stdout, cli("keys", "list", "--json").stdout
    assert "their [red]shop" in table
    assert "valid" in table
    assert json.loads(lines)["key_id"] == key.key_id
    secret = text.split("-", 2)[2]
    assert secret not in table + lines


def test_scopes_and_whose_they_are(cli: Cli, ledger: Ledger) -> None:
    assert cli("keys", "list").stdout == "none\n"
    many = ("--scope", "usage", "--scope", "read", "--scope", "usage")
    cli("keys", "create", "--tenant", "acme", *many)
    cli("keys", "create", "--tenant", "ops", "--scope", "admin")
    found = {key.tenant: key for key in Keys(ledger.engine).list()}
    assert {name: key.scopes for name, key in found.items()} == {
        "acme": ("read", "usage"),
        "ops": ("admin",),
    }
    assert found["ops"].expires_us is None
    shown = cli("keys", "list", "--tenant", "ops").stdout
    assert found["ops"].key_id in shown
    assert found["acme"].key_id not in shown


def test_a_key_is_revoked(cli: Cli, ledger: Ledger) -> None:
    text = cli("keys", "create", "--tenant", "acme").stdout.strip()
    key_id = text.split("-")[1]
    for _ in range(2):
        done = cli("keys", "revoke", key_id).stdout
        assert done == f"key {key_id} of tenant acme revoked\n"
    assert Keys(ledger.engine).check(text) is None
    assert "revoked" in cli("keys", "list").stdout
    assert "no such key; `lorabatch keys list`" in said(cli("keys", "revoke", "x\x1b[1m", code=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--tenant'"),
        (["--tenant", "a b"], "wanted letters, digits"),
        (["--tenant", "acme", "--scope", "root"], "'root': wanted generate, read, usage, admin"),
        (["--tenant", "acme", "--name", "x" * 256], "255 characters at most"),
        (["--tenant", "acme", "--name", "a\nb"], "wanted one line"),
        *(
            (
                ["--tenant", "acme", "--expires", text],
                f"'{text}': wanted a whole number above 0 and m, h",
            )
            for text in ("30", "0d", "-1d", "1.5h", "3651d", "d")
        ),
    ],
)
def test_what_is_no_key(cli: Cli, ledger: Ledger, arguments: list[str], message: str) -> None:
    assert message in said(cli("keys", "create", *arguments, code=2))
    assert Keys(ledger.engine).list() == []


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that would have been listened at."""
    hosts: list[str] = []

    def run(self: uvicorn.Server) -> None:
        hosts.append(self.config.host)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    return hosts


def test_others_are_served_once_somebody_has_a_key(
    cli: Cli, served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("serve")
    refused = cli("serve", "--host", "0.0.0.0", code=2).stderr
    assert "nobody has a key yet: make one with `lorabatch keys create --tenant T`" in refused
    text = cli("keys", "create", "--tenant", "acme").stdout.strip()
    cli("serve", "--host", "0.0.0.0")
    monkeypatch.setenv("LORABATCH_HTTP_KEYS", "off")
    off = cli("serve", "--host", "0.0.0.0", code=2).stderr
    assert "LORABATCH_HTTP_KEYS is 'off'" in off
    monkeypatch.delenv("LORABATCH_HTTP_KEYS")
    cli("keys", "revoke", text.split("-")[1])
    assert "nobody has a key" in cli("serve", "--host", "0.0.0.0", code=2).stderr
    assert served == ["127.0.0.1", "0.0.0.0"]


def said(result: Any) -> str:
    """What stands in typer's box."""
    text = re.sub(r"[│╭╮╰╯─]", "", result.stderr)
    assert "\x1b" not in text
    return " ".join(text.split())
