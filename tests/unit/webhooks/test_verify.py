"""The helper for receivers, against the package of Standard Webhooks, both ways."""

from __future__ import annotations

import base64
import datetime
import json
import time
from collections.abc import Callable

import pytest
import standardwebhooks

from lorabatch.errors import NotVerified, SettingsError
from lorabatch_producer.webhooks import signature, verify

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
OTHER = "whsec_" + base64.b64encode(b"x" * 24).decode()
NOW_S = 1_800_000_000
BODY = '{"type": "job.succeeded", "data": {"text": "naïve\\u2028 \\ud83d\\ude00"}}'.encode()


def headers(secret: str = SECRET, at_s: int = NOW_S, body: bytes = BODY) -> dict[str, str]:
    return {
        "Webhook-Id": "msg_1",
        "webhook-timestamp": str(at_s),
        "WEBHOOK-SIGNATURE": signature(secret, "msg_1", at_s, body),
    }


def test_what_we_sign_the_package_of_the_standard_verifies() -> None:
    at_s = int(time.time())
    theirs = standardwebhooks.Webhook(SECRET).verify(BODY, headers(at_s=at_s))
    assert theirs == json.loads(BODY) == verify(SECRET, headers(at_s=at_s), BODY)
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(OTHER).verify(BODY, headers(at_s=at_s))


def test_what_the_package_of_the_standard_signs_we_verify() -> None:
    at = datetime.datetime.fromtimestamp(NOW_S, datetime.UTC)
    theirs = standardwebhooks.Webhook(SECRET).sign("msg_1", at, BODY.decode())
    assert theirs == signature(SECRET, "msg_1", NOW_S, BODY)
    given = {**headers(), "WEBHOOK-SIGNATURE": theirs}
    assert verify(SECRET, given, BODY, NOW_S) == json.loads(BODY)


@pytest.mark.parametrize("age_s", [-300, -1, 0, 1, 300])
def test_one_of_now_is_taken(age_s: int) -> None:
    assert verify(SECRET, headers(at_s=NOW_S - age_s), BODY, NOW_S)["type"] == "job.succeeded"


@pytest.mark.parametrize(("age_s", "when"), [(301, "301 s old"), (-301, "301 s in the future")])
def test_one_that_is_too_old_or_too_new_is_not(age_s: int, when: str) -> None:
    with pytest.raises(NotVerified, match=f"{when}, wanted 300 s at most"):
        verify(SECRET, headers(at_s=NOW_S - age_s), BODY, NOW_S)


def with_(name: str, value: str) -> Callable[[dict[str, str]], dict[str, str]]:
    return lambda given: {k: v for k, v in given.items() if k.lower() != name} | {name: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_("webhook-id", ""), "the header webhook-id is missing"),
        (with_("webhook-timestamp", ""), "the header webhook-timestamp is missing"),
        (with_("webhook-signature", ""), "the header webhook-signature is missing"),
        (with_("webhook-timestamp", "soon"), "wanted seconds since 1970"),
        (with_("webhook-timestamp", "nan"), "wanted seconds since 1970"),
        (with_("webhook-timestamp", f"{NOW_S}.5"), "wanted seconds since 1970"),
        (with_("webhook-timestamp", "٣"), "wanted seconds since 1970"),
        (with_("webhook-timestamp", str(NOW_S + 1)), "none of 1 is right"),
        (with_("webhook-id", "msg_2"), "none of 1 is right"),
        (with_("webhook-signature", "v1,"), "none of 1 is right"),
        (with_("webhook-signature", "é,x ,, v1"), "none of 3 is right"),
        (
            lambda given: with_("webhook-signature", "v2" + given["WEBHOOK-SIGNATURE"][2:])(given),
            "none of 1 is right",
        ),
        (
            lambda given: with_("webhook-signature", given["WEBHOOK-SIGNATURE"][3:])(given),
            "none of 1 is right",
        ),
    ],
)
def test_one_that_was_tampered_with_is_refused(
    change: Callable[[dict[str, str]], dict[str, str]], message: str
) -> None:
    with pytest.raises(NotVerified, match=message):
        verify(SECRET, change(headers()), BODY, NOW_S)


@pytest.mark.parametrize("body", [b"", BODY + b" ", BODY.replace(b"succeeded", b"failed")])
def test_another_body_is_refused(body: bytes) -> None:
    with pytest.raises(NotVerified, match="none of 1 is right"):
        verify(SECRET, headers(), body, NOW_S)


def test_one_of_several_signatures_or_secrets_is_enough() -> None:
    ours, theirs = headers()["WEBHOOK-SIGNATURE"], headers(OTHER)["WEBHOOK-SIGNATURE"]
    given = {**headers(), "WEBHOOK-SIGNATURE": f"v1a,zzz {theirs} v1,AAAA {ours}"}
    assert verify(SECRET, given, BODY, NOW_S)
    assert verify([OTHER, SECRET], headers(), BODY, NOW_S)
    with pytest.raises(NotVerified):
        verify([OTHER], headers(), BODY, NOW_S)
    with pytest.raises(NotVerified):
        verify([], headers(), BODY, NOW_S)


def test_a_signed_body_that_is_no_event_is_refused() -> None:
    for body in (b"[]", b"no json", b"\xff"):
        with pytest.raises(NotVerified, match="no JSON object"):
            verify(SECRET, headers(body=body), body, NOW_S)


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_!!", "nonsense!", "é"])
def test_a_secret_that_is_none_is_said_to_be(secret: str) -> None:
    with pytest.raises(SettingsError, match="wanted whsec_ and base64"):
        verify(secret, headers(), BODY, NOW_S)
