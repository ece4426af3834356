"""`lorabatch adapters add`: fetch an adapter, check it against the base model, register it.

What came from a local folder is kept in LORABATCH_ADAPTER_STORE, so that nothing that happens to
the folder later changes a version; what comes from the Hub or from S3 stays there, and workers
fetch it when they need it. Refused adapters are not registered: exit code 1.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from lorabatch.database import open_database
from lorabatch.errors import InvalidAdapter, InvalidJob
from lorabatch.job import Job
from lorabatch.location import Location
from lorabatch.registry import SHARED, Registered, Registry
from lorabatch.settings import Settings
from lorabatch_worker.commands.check import (
    EXIT_REFUSED,
    adapter_target,
    described,
    need_worker,
    settings_for,
)
from lorabatch_worker.commands.registry import one_line

__all__ = ["add"]

TENANT = typer.Option(help="whose it is; left out: everybody's")


def add(
    name: Annotated[str, typer.Argument(help="what jobs call it: NAME or OWNER/NAME")],
    source: Annotated[str, typer.Argument(help="folder, OWNER/NAME[@rev] of the Hub, s3://...")],
    tenant: Annotated[str | None, TENANT] = None,
    unchecked: Annotated[bool, typer.Option(help="do not load the base model to check it")] = False,
    base_model: Annotated[str | None, typer.Option(help="folder, or Hub id[@rev]")] = None,
    max_adapter_rank: Annotated[int | None, typer.Option(help="largest rank allowed")] = None,
) -> None:
    """Register an adapter, or another version under a name that there is already. What is queued
    keeps the version that it was accepted for."""
    need_worker()
    settings = settings_for(base_model, max_adapter_rank)
    whose = _checked_names(name, tenant)
    try:
        here = Path(source).is_dir()  # as LORABATCH_ADAPTERS takes it, with or without ./
        location = Location.parse(str(Path(source).resolve()) if here else source)
    except ValueError as error:
        typer.secho(f"lorabatch: {error}", err=True)
        raise typer.Exit(2) from None
    registry = Registry(open_database(settings), settings.base_model)
    try:
        with tempfile.TemporaryDirectory(prefix="adapter-", dir=_made(settings.home)) as scratch:
            entry, verdict = _fetched(
                settings, registry, name, whose, location, Path(scratch), unchecked
            )
    except InvalidAdapter as error:
        typer.echo(one_line(f"refused: {error}"))
        raise typer.Exit(EXIT_REFUSED) from None
    is_new = registry.add(entry)
    registry.engine.dispose()
    state = "registered" if is_new else "registered already"
    typer.echo(f"{state}: {name} for {whose or 'everybody'}: {verdict}")


def _fetched(
    settings: Settings,
    registry: Registry,
    name: str,
    tenant: str,
    location: Location,
    scratch: Path,
    unchecked: bool,
) -> tuple[Registered, str]:
    """The adapter's files where workers find them, and a line on what is in them."""
    from lorabatch_worker.adapters.disk_cache import DiskCache
    from lorabatch_worker.adapters.sources import Fetcher
    from lorabatch_worker.adapters.weights import read_adapter, version_of

    fetcher = Fetcher(settings)
    location = fetcher.pin(location, tenant)
    fetcher.fetch(location, tenant, scratch)
    adapter = None
    version = version_of(scratch)
    verdict = f"version {version[:12]}"
    if not unchecked:
        target = adapter_target(settings)
        adapter = read_adapter(name, scratch, target, version)
        verdict = described(adapter, target)
    local = location.kind == "folder"
    root = settings.adapter_store_folder if local else settings.home / "adapter-cache"
    room = sys.maxsize if local else settings.adapter_disk_bytes

    def fill(folder: Path) -> None:
        for file in scratch.iterdir():
            shutil.copyfile(file, folder / file.name)

    nbytes = sum(file.stat().st_size for file in scratch.iterdir())
    cache = DiskCache(_made(root), room, registry.pinned_versions)
    _, kept = cache.put(version, fill, f"{tenant}/{name}/{version}")
    entry = Registered(
        tenant=tenant,
        adapter_id=name,
        version=version,
        location=str(kept if local else location),
        base_model=None if adapter is None else settings.base_model,
        rank=None if adapter is None else max((s.rank for s in adapter.sites.values()), default=0),
        nbytes=nbytes,
        created_us=0,
    )
    return entry, verdict


def _checked_names(name: str, tenant: str | None) -> str:
    """The tenant as the registry has it. Names are those that a job may ask for."""
    try:
        Job.parse({"prompt": "-", "adapter_id": name, "tenant": tenant or "default"})
    except InvalidJob as error:
        typer.secho(f"lorabatch: {str(error).removeprefix('job: ')}", err=True)
        raise typer.Exit(2) from None
    return tenant or SHARED


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
