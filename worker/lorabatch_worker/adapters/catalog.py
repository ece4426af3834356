"""Which adapters there are: LORABATCH_ADAPTERS, and the folders in `adapters/` of the data folder.

A name stands for a local folder or for a Hub id at a revision. Nothing else can be asked for:
an unknown name is an error of that job, never the base model and never a download. Raises
UnknownAdapter, AdapterUnavailable.
"""

from __future__ import annotations

from pathlib import Path

from lorabatch.errors import AdapterUnavailable, UnknownAdapter
from lorabatch.settings import AdapterSource, Settings, is_path
from lorabatch_worker.adapters.weights import CONFIG, FILES

__all__ = ["AdapterCatalog"]


class AdapterCatalog:
    """Names of adapters, and the folder that each one's files are in."""

    def __init__(self, settings: Settings) -> None:
        self._root = settings.home / "adapters"
        self._sources = {source.name: source for source in settings.adapters}
        # Now, so that a folder that goes away later is not looked for on the Hub.
        self._folders = {
            source.name: Path(source.location).expanduser().resolve()
            for source in settings.adapters
            if is_path(source.location)
        }

    def names(self) -> list[str]:
        """Every name that a job may ask for just now."""
        found = set(self._sources)
        if self._root.is_dir():
            found |= {p.name for p in self._root.iterdir() if (p / CONFIG).is_file()}
        return sorted(found)

    def locate(self, adapter_id: str) -> Path:
        """The folder with the adapter's files, fetched from the Hub if need be. May take long."""
        source = self._sources.get(adapter_id)
        if source is None:
            return self._in_root(adapter_id)
        folder = self._folders.get(adapter_id)
        if folder is not None:
            if not folder.is_dir():
                raise AdapterUnavailable(
                    f"adapter {adapter_id!r}: its folder is not there; check LORABATCH_ADAPTERS"
                )
            return folder
        return _fetch(source)

    def _in_root(self, adapter_id: str) -> Path:
        folder = (self._root / adapter_id).resolve()
        plain = Path(adapter_id).name == adapter_id
        inside = plain and folder.parent == self._root.resolve()
        if not inside or not (folder / CONFIG).is_file():
            names = ", ".join(self.names()) or "none"
            raise UnknownAdapter(
                f"adapter {adapter_id!r}: not known to this worker (known: {names}); add it to "
                "LORABATCH_ADAPTERS"
            )
        return folder


def _fetch(source: AdapterSource) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    where = source.location + (f"@{source.revision}" if source.revision else "")
    try:
        path = snapshot_download(
            source.location, revision=source.revision, allow_patterns=list(FILES)
        )
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise UnknownAdapter(
            f"adapter {source.name!r}: the Hub has no {where!r} that this worker may read"
        ) from None
    except Exception as error:  # noqa: BLE001 - the hub raises from several trees
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterUnavailable(
            f"adapter {source.name!r}: the Hub did not give {where!r}: {reason}"
        ) from None
    return Path(path)
