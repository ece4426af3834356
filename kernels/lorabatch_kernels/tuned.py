"""Plans that bench/tune.py measured, a table for each generation of devices: tuned/sm_90.json.

    {"measured": {...}, "lora": {"4096,6144,64,16,bfloat16": {a Plan's fields}}, "attention": {...}}

The keys are the arguments of `plan_for` and `attention_plan`. A size that is not in the table, and
a generation without one, keeps the plans of plan.py.

Raises ValueError for a table that does not hold such plans.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

FOLDER = Path(__file__).parent / "tuned"

P = TypeVar("P")


@lru_cache(maxsize=64)
def generation(device: torch.device) -> str | None:
    """ "sm_90", or AMD's "gfx942"; None on a CPU."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def key_of(*sizes: Any) -> str:
    """Sizes and dtypes as the tables write them."""
    return ",".join(str(size).removeprefix("torch.") for size in sizes)


def tuned_plan(kind: str, make: Callable[..., P], on: str | None, *sizes: Any) -> P | None:
    """The plan of `kind` ("lora", "attention") for these sizes on the generation `on`, if any."""
    if on is None:
        return None
    fields = _table(on).get(kind, {}).get(key_of(*sizes))
    if fields is None:
        return None
    try:
        return make(**fields)
    except TypeError as error:
        raise ValueError(f"{FOLDER / on}.json, {kind} {key_of(*sizes)}: {error}") from error


@lru_cache(maxsize=8)
def _table(on: str) -> dict[str, dict[str, Any]]:
    path = FOLDER / f"{on}.json"
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text())
        return {kind: dict(table[kind]) for kind in ("lora", "attention")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of plans: {error!r}") from error
