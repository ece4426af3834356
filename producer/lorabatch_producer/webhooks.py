"""For whoever receives webhooks: whether one came from us, as it is, and just now.

    event = verify(secret, request.headers, request.get_data())
    if event["type"] == "job.succeeded":
        print(event["data"]["text"])

Signed as standardwebhooks.com has it: HMAC-SHA256 over `id.timestamp.body`. A delivery may come
more than once, always with the same `webhook-id`. Raises NotVerified.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from lorabatch.errors import NotVerified, SettingsError

__all__ = ["ID", "SIGNATURE", "TIMESTAMP", "TOLERANCE_S", "signature", "verify"]

ID, TIMESTAMP, SIGNATURE = "webhook-id", "webhook-timestamp", "webhook-signature"
TOLERANCE_S = 300
VERSION = "v1"
PREFIX = "whsec_"
_SECONDS = re.compile(r"[0-9]{1,12}", re.ASCII)


def verify(
    secret: str | Iterable[str],
    headers: Mapping[str, str],
    body: bytes,
    now_s: float | None = None,
) -> dict[str, Any]:
    """The event, if it was signed with this secret, or one of these, within five minutes of now.
    `body`: as it came, before anybody parsed it; `now_s`: seconds UTC, for tests."""
    secrets = [secret] if isinstance(secret, str) else list(secret)
    given = {name.lower(): value for name, value in headers.items()}
    missing = [name for name in (ID, TIMESTAMP, SIGNATURE) if not given.get(name)]
    if missing:
        raise NotVerified(f"the header {missing[0]} is missing: this is no webhook of ours")
    said = given[TIMESTAMP]
    if not _SECONDS.fullmatch(said):
        raise NotVerified(f"{TIMESTAMP}: wanted seconds since 1970")
    age_s = (time.time() if now_s is None else now_s) - int(said)
    if abs(age_s) > TOLERANCE_S:
        when = f"{age_s:.0f} s old" if age_s > 0 else f"{-age_s:.0f} s in the future"
        raise NotVerified(
            f"{TIMESTAMP}: it is {when}, wanted {TOLERANCE_S} s at most: it was sent before, or a "
            "clock is wrong"
        )
    expected = [signature(one, given[ID], int(said), body).encode() for one in secrets]
    shown = [one.encode() for one in given[SIGNATURE].split(" ")]
    if not any(hmac.compare_digest(ours, one) for ours in expected for one in shown):
        raise NotVerified(
            f"{SIGNATURE}: none of {len(shown)} is right: the body was changed, or parsed and "
            "written again, or the secret is another tenant's or an old one"
        )
    return _event(body)


def signature(secret: str, webhook_id: str, timestamp_s: int, body: bytes) -> str:
    """`v1,...`, as the header has one for each secret. Raises SettingsError for no secret."""
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (ValueError, binascii.Error):
        key = b""
    if not key:
        raise SettingsError(f"webhook secret: wanted {PREFIX} and base64, as it was shown")
    signed = b".".join([webhook_id.encode(), str(timestamp_s).encode(), body])
    digest = hmac.new(key, signed, hashlib.sha256).digest()
    return f"{VERSION},{base64.b64encode(digest).decode()}"


def _event(body: bytes) -> dict[str, Any]:
    try:
        event = json.loads(body)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise NotVerified("the body is signed, but no JSON object")
    return event
