"""Secrets of webhooks: one a tenant, more while they change."""

from __future__ import annotations

import base64

import pytest
import sqlalchemy as sa

from lorabatch.errors import IdempotencyConflict
from lorabatch.webhook_secrets import Secret, Secrets


@pytest.fixture
def secrets(database: sa.Engine) -> Secrets:
    return Secrets(database)


def valid(secrets: Secrets, tenant: str = "acme") -> list[Secret]:
    return [one for one in secrets.list(tenant) if one.valid]


def test_a_secret_is_random_and_its_tenants(secrets: Secrets) -> None:
    ours, theirs = secrets.create("acme"), secrets.create("beta")
    assert ours.secret.startswith("whsec_")
    assert len(base64.b64decode(ours.secret.removeprefix("whsec_"))) == 32
    assert ours.secret != theirs.secret
    assert secrets.list("acme") == [ours]
    assert set(secrets.list()) == {ours, theirs}
    assert ours.secret not in repr(ours)
    with pytest.raises(IdempotencyConflict, match=f"'acme': it has secret '{ours.secret_id}'"):
        secrets.create("acme")


def test_rotated_ones_sign_on_for_a_while(secrets: Secrets) -> None:
    first, other = secrets.create("acme"), secrets.create("beta")
    second = secrets.rotate("acme", 3600)
    new, old = secrets.list("acme")
    assert (new, old.secret_id) == (second, first.secret_id)
    assert new.expires_us is None
    assert old.expires_us == pytest.approx(new.created_us + 3600 * 10**6, abs=60 * 10**6)
    assert [one.secret for one in valid(secrets)] == [second.secret, first.secret]
    third = secrets.rotate("acme", 86_400)
    assert {one.secret_id: one.expires_us for one in secrets.list("acme")} == {
        third.secret_id: None,
        second.secret_id: secrets.list("acme")[1].expires_us,
        first.secret_id: old.expires_us,  # no longer than it had
    }
    secrets.rotate("acme", 0)
    assert len(valid(secrets)) == 1
    assert secrets.list("beta") == [other]


def test_a_revoked_one_signs_nothing(secrets: Secrets) -> None:
    first = secrets.create("acme")
    second = secrets.rotate("acme")
    gone = secrets.revoke(first.secret_id)
    assert gone is not None
    assert (gone.secret_id, gone.valid) == (first.secret_id, False)
    assert secrets.revoke(first.secret_id) == gone
    assert valid(secrets) == [second]
    assert secrets.revoke("nonsense") is None
    secrets.revoke(second.secret_id)
    assert valid(secrets) == []
    assert secrets.create("acme").valid
