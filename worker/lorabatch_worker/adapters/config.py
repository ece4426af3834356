"""adapter_config.json as PEFT writes it: what is honoured, what is refused, by name.

Only fields that change what the adapter computes matter here; `target_modules` and its kin
describe training and are not read, because the tensors say which layers are adapted. A field
that we do not know is refused unless it is off. Raises InvalidAdapter, UnsupportedAdapter.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorabatch.errors import InvalidAdapter, UnsupportedAdapter, shown

__all__ = ["AdapterConfig", "read_config"]

MAX_CONFIG_BYTES = 1 << 20
MAX_PATTERN_CHARS = 200

# Honoured here or by the loader.
READ = {
    "peft_type",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "init_lora_weights",
}
# About training, or about how PEFT runs it; the tensors are the same with or without.
NO_EFFECT = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
    "eva_config",
    "loftq_config",
    "corda_config",
    "lora_ga_config",
}
SAFE_INIT = {True, False, "gaussian", "eva", "orthogonal"}
BASE_CHANGING_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """The part of the configuration that decides ranks and scalings."""

    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    base_model: str | None = None

    def rank_of(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA, with the module's own alpha and r."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return float(alpha / math.sqrt(rank) if self.use_rslora else alpha / rank)


def read_config(path: Path) -> AdapterConfig:
    """Read and check one adapter_config.json."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise InvalidAdapter(f"{path.name} is over {MAX_CONFIG_BYTES} bytes")
        raw = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InvalidAdapter(f"{path.name} is missing: not a PEFT adapter") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidAdapter(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InvalidAdapter(f"{path.name} holds {shown(raw)}, wanted an object")
    if raw.get("peft_type") != "LORA":
        raise UnsupportedAdapter(f"peft_type is {shown(raw.get('peft_type'))}, wanted 'LORA'")
    _refuse_unsupported(raw)
    base = raw.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise InvalidAdapter(f"base_model_name_or_path is {shown(base)}, wanted a string or null")
    return AdapterConfig(
        rank=_number(raw, "r", whole=True),
        alpha=_number(raw, "lora_alpha"),
        use_rslora=bool(raw.get("use_rslora", False)),
        rank_pattern=_pattern(raw, "rank_pattern", whole=True),
        alpha_pattern=_pattern(raw, "alpha_pattern"),
        base_model=base or None,
    )


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INIT):
        raise UnsupportedAdapter(
            f"init_lora_weights is {init!r}, which changed the base model's weights in training; "
            "convert it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=)"
        )
    if not isinstance(init, (bool, str)) or init not in SAFE_INIT:
        raise UnsupportedAdapter(f"init_lora_weights is {shown(init)}, wanted {SAFE_INIT}")
    for name, value in raw.items():
        if name in READ or name in NO_EFFECT:
            continue
        if value in (None, False, "", "none", [], {}):
            continue
        raise UnsupportedAdapter(f"{name} is {shown(value)}, which is not supported; wanted it off")


def _number(raw: dict[str, Any], name: str, whole: bool = False) -> Any:
    return _checked(raw.get(name), name, whole)


def _checked(value: Any, name: str, whole: bool) -> Any:
    right = isinstance(value, int) if whole else isinstance(value, (int, float))
    if not right or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        kind = "a positive whole number" if whole else "a positive number"
        raise InvalidAdapter(f"{name} is {shown(value)}, wanted {kind}")
    return value


def _pattern(raw: dict[str, Any], name: str, whole: bool = False) -> dict[str, Any]:
    given = raw.get(name) or {}
    if not isinstance(given, dict):
        raise InvalidAdapter(f"{name} is {shown(given)}, wanted an object")
    for key, value in given.items():
        _checked(value, f"{name}[{key!r}]", whole)
        _check_pattern(key, name)
    return given


def _check_pattern(key: str, name: str) -> None:
    """Keys are regular expressions to PEFT. One from a stranger must not run for ever: nothing
    repeated may hold a repetition, and at most two parts may repeat."""
    repeats = re.findall(r"(?<!\\)[*+{]", key)
    if len(key) > MAX_PATTERN_CHARS or len(repeats) > 2 or re.search(r"\)\s*[*+?{]", key):
        raise UnsupportedAdapter(
            f"{name}: {shown(key)} is too involved a pattern; wanted a module name, or at most "
            "two plain repetitions"
        )
    try:
        re.compile(key)
    except re.error as error:
        raise InvalidAdapter(f"{name}: {shown(key)} is no regular expression: {error}") from None


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first key that matches a whole tail of the module's name."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
