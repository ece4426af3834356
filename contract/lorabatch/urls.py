"""URLs of broker, result backend and database: which kinds there are, in one spelling; which hosts
only this machine reaches.

Raises ValueError, which says what is allowed.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Annotated

from pydantic import AfterValidator

__all__ = ["BackendUrl", "BrokerUrl", "DatabaseUrl", "is_loopback"]

REDIS = r"(redis|rediss|redis\+socket)://"


def _broker(url: str) -> str:
    if not re.match(REDIS, url):
        raise ValueError("allowed: a redis://, rediss:// or redis+socket:// URL")
    return url


def _backend(url: str) -> str:
    if not re.match(rf"lorabatch(\+|$)|{REDIS}", url):
        raise ValueError(
            "allowed: a redis://, rediss:// or redis+socket:// URL, lorabatch, or lorabatch+ "
            "before a database URL"
        )
    return url


def _database(url: str) -> str:
    if url.startswith("sqlite:///"):
        return url
    plain = re.sub(r"^(postgres|postgresql)(\+psycopg)?://", "postgresql+psycopg://", url)
    if not plain.startswith("postgresql+psycopg://"):
        raise ValueError("allowed: a sqlite:///FILE or postgresql:// URL")
    return plain


BrokerUrl = Annotated[str, AfterValidator(_broker)]
BackendUrl = Annotated[str, AfterValidator(_backend)]
DatabaseUrl = Annotated[str, AfterValidator(_database)]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there; of other names nobody knows."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
