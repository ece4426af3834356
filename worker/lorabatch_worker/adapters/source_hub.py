"""Adapters on the Hub, or on a mirror of it: the standard HF_* and proxy variables hold.

Which token is shown: for what everybody may use (tenant "") this machine's own, as
huggingface_hub finds it; for a tenant's own adapters the file of its name in
LORABATCH_HUB_TOKEN_FOLDER, and none if there is no such file. So no tenant reaches a private
repository by another's token or by ours. Offline (HF_HUB_OFFLINE), what everybody may use comes
from this machine's Hub cache.

huggingface_hub's own download starts anew after each failed call, so files are asked for here, by
its session and headers. Raises Absent, Refused, Failed, Busy; what the network raises passes
through.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lorabatch.fields import is_identifier
from lorabatch.location import Location
from lorabatch_worker.adapters.attempts import Absent, Busy, Deadline, Failed, one_line
from lorabatch_worker.adapters.download import RemoteFile, receive
from lorabatch_worker.adapters.source_folder import copy_folder
from lorabatch_worker.adapters.weights import CONFIG, FILES

__all__ = ["HubSource"]

PASSING = {408, 425, 429, 500, 502, 503, 504}
NO_ACCESS = {401, 403, 404, 410}


class HubSource:
    """Asks one Hub. Safe for many threads."""

    def __init__(self, token_folder: Path | None) -> None:
        self._token_folder = token_folder

    def pin(self, location: Location, tenant: str, deadline: Deadline) -> Location:
        """The same at a commit, whose files never change."""
        from huggingface_hub import is_offline_mode

        if location.pinned:
            return location
        if is_offline_mode():
            return replace(location, revision=_cached(location, tenant).name)
        sha = self._about(location, self._token(tenant), deadline).sha
        if not sha:
            raise Failed("the Hub names no commit; if HF_ENDPOINT is set, is it a Hub's?")
        return replace(location, revision=sha)

    def fetch(
        self, location: Location, tenant: str, into: Path, limit: int, deadline: Deadline
    ) -> None:
        from huggingface_hub import hf_hub_url, is_offline_mode

        if is_offline_mode():
            folder = _cached(location, tenant)
            # A snapshot is symlinks into the blobs beside it.
            return copy_folder(str(folder), into, [folder.parent.parent], limit, deadline)
        token = self._token(tenant)
        about = self._about(location, token, deadline)
        files = [
            _file(found, hf_hub_url(location.place, found.rfilename, revision=about.sha), about.sha)
            for found in about.siblings or []
            if found.rfilename in FILES
        ]

        def open_at(
            file: RemoteFile, start: int
        ) -> contextlib.AbstractContextManager[tuple[int, Iterator[bytes]]]:
            return _open(file.address, start, token, deadline)

        return receive(files, into, open_at, limit, deadline)

    def _token(self, tenant: str) -> str | bool | None:
        """As huggingface_hub takes it: None is this machine's own, False none."""
        if not tenant:
            return None
        if self._token_folder is None or not is_identifier(tenant):
            return False
        try:
            token = (self._token_folder / tenant).read_text("ascii", "replace").strip()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise Failed(f"the token file of tenant {tenant!r}: {error.strerror}") from None
        # Said here: the library's error for a header that cannot be sent repeats it.
        if not re.fullmatch(r"[!-~]+", token):
            raise Failed(f"the token file of tenant {tenant!r} holds no token: wanted one line")
        return token

    def _about(self, location: Location, token: str | bool | None, deadline: Deadline) -> Any:
        from huggingface_hub import HfApi, constants

        with _errors():
            return HfApi(library_name="lorabatch").model_info(
                location.place,
                revision=location.revision,
                files_metadata=True,
                token=token,
                timeout=_timeout(constants.HF_HUB_ETAG_TIMEOUT, deadline),
            )


@contextlib.contextmanager
def _open(
    url: str, start: int, token: str | bool | None, deadline: Deadline
) -> Iterator[tuple[int, Iterator[bytes]]]:
    from huggingface_hub import constants, get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = build_hf_headers(token=token, library_name="lorabatch")
    headers["Accept-Encoding"] = "identity"  # a range is of the file, not of its compressed form
    if start:
        headers["Range"] = f"bytes={start}-"
    timeout = _timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT, deadline)
    with (
        _errors(),
        # Redirects to a store of files are followed without the token: another host's.
        get_session().stream("GET", url, headers=headers, timeout=timeout) as response,
    ):
        hf_raise_for_status(response)
        yield (start if response.status_code == 206 else 0), response.iter_bytes()


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """The Hub's answers, by what is to be done about them."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise Failed("HF_HUB_OFFLINE is set") from None
    except HFValidationError as error:
        raise Failed(one_line(error)) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in NO_ACCESS:
            raise Absent from None
        host = urlsplit(str(error.response.url)).netloc.rpartition("@")[2]
        reason = f"{host} answered HTTP {status}"
        if status in PASSING:
            raise Busy(reason, _seconds(error.response.headers.get("Retry-After"))) from None
        raise Failed(reason) from None


def _seconds(text: str | None) -> float:
    return float(text) if text and text.isdecimal() else 0.0


def _timeout(seconds: float, deadline: Deadline) -> float:
    return max(0.1, min(seconds, deadline.left_s))


def _file(found: Any, url: str, sha: str) -> RemoteFile:
    digest = None
    if found.lfs is not None:
        digest = f"sha256:{found.lfs.sha256}"
    elif found.blob_id is not None:
        digest = f"git:{found.blob_id}"
    size = found.size if found.size is not None else found.lfs and found.lfs.size
    return RemoteFile(found.rfilename, url, f"{sha} {digest}", size, digest)


def _cached(location: Location, tenant: str) -> Path:
    """The snapshot in this machine's Hub cache, of what everybody may use."""
    from huggingface_hub import try_to_load_from_cache

    if tenant:  # what lies there may be private, and came by this machine's token
        raise Failed("HF_HUB_OFFLINE is set, and only shared adapters come from the Hub's cache")
    config = try_to_load_from_cache(location.place, CONFIG, revision=location.revision)
    if not isinstance(config, str):
        raise Failed(
            "HF_HUB_OFFLINE is set and this machine's Hub cache does not have it: run "
            f"`hf download {location.place}` where there is a network, or unset it"
        )
    return Path(config).parent
