"""Adapters in an S3 bucket, or in any store that speaks S3: boto3 and the standard AWS_* variables.

AWS_ENDPOINT_URL_S3 (or AWS_ENDPOINT_URL) names another store than Amazon's. Needs to list and to
read (s3:ListBucket, s3:GetObject). Credentials are this machine's: whoever may register a location
may use what they reach. Raises Absent, Failed, Busy; what the network raises passes through.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorabatch.location import Location
from lorabatch_worker.adapters.attempts import Absent, Busy, Deadline, Failed, one_line
from lorabatch_worker.adapters.download import RemoteFile, receive
from lorabatch_worker.adapters.weights import FILES

__all__ = ["S3Source"]

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 20
PIECE_BYTES = 1 << 16
"""Small: the deadline is looked at between two pieces, and each waits until it is full."""
NO_ACCESS = {401, 403, 404}
CHANGED = {412, 416}


class S3Source:
    """Asks one store. Safe for many threads."""

    def __init__(self) -> None:
        self._made: Any = None
        self._lock = threading.Lock()

    def fetch(self, location: Location, into: Path, limit: int, deadline: Deadline) -> None:
        client = self._client()
        files = _list(client, location)
        if not files:
            raise Absent

        def open_at(
            file: RemoteFile, start: int
        ) -> contextlib.AbstractContextManager[tuple[int, Iterator[bytes]]]:
            return _open(client, location.place, file, start)

        receive(files, into, open_at, limit, deadline)

    def _client(self) -> Any:
        """One for all threads, made by the first that asks."""
        try:
            import boto3
            from botocore.config import Config
        except ImportError:
            raise Failed(
                "s3:// needs boto3, which is not installed: pip install 'lorabatch[s3]'"
            ) from None
        with self._lock, _errors():
            if self._made is None:
                config = Config(
                    connect_timeout=CONNECT_TIMEOUT_S,
                    read_timeout=READ_TIMEOUT_S,
                    retries={"mode": "standard", "total_max_attempts": 1},  # ours can be stopped
                )
                self._made = boto3.session.Session().client("s3", config=config)
        return self._made


def _list(client: Any, location: Location) -> list[RemoteFile]:
    """The adapter's files, in one answer, so that all are of the same moment."""
    prefix = f"{location.prefix}/" if location.prefix else ""
    found = []
    with _errors():
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=location.place, Prefix=prefix, Delimiter="/"
        )
        for page in pages:
            for item in page.get("Contents", ()):
                name = item["Key"].removeprefix(prefix)
                if name in FILES:
                    found.append(RemoteFile(name, item["Key"], item["ETag"], item["Size"]))
    return found


@contextlib.contextmanager
def _open(
    client: Any, bucket: str, file: RemoteFile, start: int
) -> Iterator[tuple[int, Iterator[bytes]]]:
    # Without a range where it can be: then botocore checks the store's checksum of the whole.
    span = {"Range": f"bytes={start}-"} if start else {}
    with _errors():
        answer = client.get_object(Bucket=bucket, Key=file.address, IfMatch=file.tag, **span)
        with contextlib.closing(answer["Body"]) as body:
            partial = answer["ResponseMetadata"]["HTTPStatusCode"] == 206
            yield (start if partial else 0), body.iter_chunks(PIECE_BYTES)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """The store's answers, by what is to be done about them."""
    from botocore import exceptions as of

    try:
        yield
    except of.ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = error.response.get("Error", {}).get("Code", "")
        if status in NO_ACCESS:
            raise Absent from None
        if status in CHANGED:
            raise Busy("it changed while it was fetched") from None
        if status >= 500 or status in (408, 429):
            raise Busy(f"the store answered {code} (HTTP {status})") from None
        raise Failed(f"the store answered {code} (HTTP {status})") from None
    except (of.NoCredentialsError, of.PartialCredentialsError, of.CredentialRetrievalError):
        raise Failed(
            "no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or any other way "
            "that boto3 knows"
        ) from None
    except (of.ParamValidationError, of.ProfileNotFound, ValueError) as error:
        raise Failed(f"boto3 refuses: {one_line(error)}") from None
