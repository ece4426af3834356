"""Where adapters come from: folders, the Hub, S3. One call, whatever the source.

An adapter comes within LORABATCH_ADAPTER_FETCH_TIMEOUT_S or not at all; passing faults are tried
again. Raises UnknownAdapter (the source has none that may be read: one sentence for both, so that
nobody learns what others have), AdapterUnavailable (it did not come, and why), InvalidAdapter (it
is there and refused). What they say to the public names no place, what they say to others does.
Not covered: whether the adapter is any good (weights.py), and which version
it is (disk_cache.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lorabatch.errors import AdapterUnavailable, InvalidAdapter, UnknownAdapter
from lorabatch.location import Location
from lorabatch.settings import Settings
from lorabatch_worker.adapters.attempts import Absent, Deadline, Failed, Refused, until_it_comes
from lorabatch_worker.adapters.source_folder import copy_folder
from lorabatch_worker.adapters.source_hub import HubSource
from lorabatch_worker.adapters.source_s3 import S3Source
from lorabatch_worker.adapters.weights import CONFIG

__all__ = ["Fetcher", "Location"]

T = TypeVar("T")

ABSENT = "there is no adapter that may be read"
NOT_COME = "it did not come from where it is kept; the worker's log says why"
ACCESS = {
    "folder": "check the path",
    "hub": "check the spelling; a private one needs a token: of a tenant's adapters the file "
    "LORABATCH_HUB_TOKEN_FOLDER/TENANT, of shared ones HF_TOKEN",
    "s3": "check the spelling, and that these AWS credentials may list and read it",
}


class Fetcher:
    """Brings adapters' files. Safe for many threads; `stop` ends every wait."""

    def __init__(self, settings: Settings, stop: threading.Event | None = None) -> None:
        self._settings = settings
        self._stop = stop or threading.Event()
        self._hub = HubSource(settings.hub_token_folder)
        self._s3 = S3Source()

    def pin(self, location: Location, tenant: str) -> Location:
        """On the Hub the same at a commit; elsewhere as it is. `tenant`: whose adapter it is, ""
        for one that everybody may use."""
        if location.kind != "hub":
            return location
        return self._attempt(location, lambda until: self._hub.pin(location, tenant, until))

    def fetch(self, location: Location, tenant: str, into: Path) -> None:
        """Bring the adapter's files into the folder, and nothing else. What is left there of an
        attempt at the same location that failed is not fetched again."""
        into.mkdir(parents=True, exist_ok=True)
        self._attempt(location, lambda until: self._bring(location, tenant, into, until))

    def _bring(self, location: Location, tenant: str, into: Path, until: Deadline) -> None:
        limit = self._settings.adapter_max_bytes
        if location.kind == "folder":
            copy_folder(location.place, into, self._settings.adapter_roots, limit, until)
        elif location.kind == "hub":
            self._hub.fetch(location, tenant, into, limit, until)
        else:
            self._s3.fetch(location, into, limit, until)
        if not (into / CONFIG).is_file():
            raise Refused(f"it holds no {CONFIG}, so it is not a PEFT adapter")

    def _attempt(self, location: Location, call: Callable[[Deadline], T]) -> T:
        until = Deadline(self._settings.adapter_fetch_timeout_s, self._stop)
        attempts = self._settings.adapter_fetch_attempts
        try:
            return until_it_comes(lambda: call(until), attempts, until, str(location))
        except Absent:
            raise UnknownAdapter(
                f"{location}: {ABSENT}; {ACCESS[location.kind]}", f"{ABSENT} where it should be"
            ) from None
        except Refused as error:
            raise InvalidAdapter(f"{location}: {error}", error.public) from None
        except Failed as error:
            raise AdapterUnavailable(f"{location} did not come: {error}", NOT_COME) from None
