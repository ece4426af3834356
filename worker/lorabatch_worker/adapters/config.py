"""adapter_config.json as PEFT writes it: what is honoured, what is refused, by name.

Only fields that change what the adapter computes matter here; `target_modules` and its kin
describe training and are not read, because the tensors say which layers are adapted. A field
that we do not know is refused unless it is off. Raises InvalidAdapter, UnsupportedAdapter.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorabatch.errors import InvalidAdapter, UnsupportedAdapter, shown

__all__ = ["AdapterConfig", "read_config"]

MAX_CONFIG_BYTES = 1 << 20
MAX_PATTERN_CHARS = 200
MAX_PATTERNS = 32  # that are more than a module's name
MAX_NUMBER = 1e30

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
    "use_dora",
    "lora_bias",
    "bias",
    "modules_to_save",
    "trainable_token_indices",
}
BIAS = ("none", "all", "lora_only")
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
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    token_indices: Mapping[str, Sequence[int]] = field(default_factory=dict)
    saved: Sequence[str] = ()

    def rank_of(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def tokens_of(self, module: str) -> Sequence[int]:
        """Of trainable_token_indices, those of this module. A list is the embedding's, the only one
        whose tensors then are in the file: under "", a tail of any name."""
        named = [name for name in self.token_indices if f".{module}".endswith(f".{name}")]
        named += [name for name in self.token_indices if not name]
        return next((self.token_indices[name] for name in named), ())

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
    except OSError as error:
        raise InvalidAdapter(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InvalidAdapter(f"{path.name} holds {shown(raw)}, wanted an object")
    if raw.get("peft_type") != "LORA":
        raise UnsupportedAdapter(f"peft_type is {shown(raw.get('peft_type'))}, wanted 'LORA'")
    _refuse_unsupported(raw)
    base = raw.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise InvalidAdapter(f"base_model_name_or_path is {shown(base)}, wanted a string or null")
    bias = raw.get("bias") or "none"
    if bias not in BIAS:
        raise InvalidAdapter(f"bias is {shown(bias)}, wanted one of {', '.join(BIAS)}")
    use_dora, lora_bias = _flag(raw, "use_dora"), _flag(raw, "lora_bias")
    if use_dora and lora_bias:
        raise UnsupportedAdapter("lora_bias with use_dora, which PEFT refuses, too")
    return AdapterConfig(
        rank=_number(raw, "r", whole=True),
        alpha=_number(raw, "lora_alpha"),
        use_rslora=_flag(raw, "use_rslora"),
        rank_pattern=_pattern(raw, "rank_pattern", whole=True),
        alpha_pattern=_pattern(raw, "alpha_pattern"),
        base_model=base or None,
        use_dora=use_dora,
        lora_bias=lora_bias,
        bias=bias,
        token_indices=_token_indices(raw),
        saved=tuple(_names(raw, "modules_to_save")),
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


def _flag(raw: dict[str, Any], name: str) -> bool:
    value = raw.get(name) or False
    if value is not True and value is not False:
        raise InvalidAdapter(f"{name} is {shown(value)}, wanted true or false")
    return value


def _token_indices(raw: dict[str, Any]) -> dict[str, list[int]]:
    given = raw.get("trainable_token_indices") or {}
    by_module = {"": given} if isinstance(given, list) else given
    if not isinstance(by_module, dict) or not all(
        isinstance(ids, list) and all(type(token) is int for token in ids)
        for ids in by_module.values()
    ):
        raise InvalidAdapter(
            f"trainable_token_indices is {shown(given)}, wanted a list of tokens, or one by module"
        )
    return by_module


def _names(raw: dict[str, Any], name: str) -> list[str]:
    given = raw.get(name) or []
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise InvalidAdapter(f"{name} is {shown(given)}, wanted a list of module names")
    return given


def _number(raw: dict[str, Any], name: str, whole: bool = False) -> Any:
    return _checked(raw.get(name), name, whole)


def _checked(value: Any, name: str, whole: bool) -> Any:
    right = isinstance(value, int) if whole else isinstance(value, (int, float))
    if not right or isinstance(value, bool) or not 0 < value < MAX_NUMBER:
        kind = "whole number" if whole else "number"
        raise InvalidAdapter(f"{name} is {shown(value)}, wanted a positive {kind} below 1e30")
    return value


def _pattern(raw: dict[str, Any], name: str, whole: bool = False) -> dict[str, Any]:
    given = raw.get(name) or {}
    if not isinstance(given, dict):
        raise InvalidAdapter(f"{name} is {shown(given)}, wanted an object")
    for key, value in given.items():
        _checked(value, f"{name}[{shown(key)}]", whole)
        _check_pattern(key, name)
    involved = sum(1 for key in given if re.search(r"[*+?{(|]", key))
    if involved > MAX_PATTERNS:
        raise UnsupportedAdapter(
            f"{name}: {involved} patterns that are no plain names, allowed {MAX_PATTERNS}; "
            "wanted module names"
        )
    return given


def _check_pattern(key: str, name: str) -> None:
    """Keys are regular expressions to PEFT. One from a stranger must not run for ever: at most two
    parts may repeat, and the one group allowed, which may hold alternatives, may not."""
    repeats, groups = (len(re.findall(kind, key)) for kind in (r"[*+?{]", r"\("))
    if (
        len(key) > MAX_PATTERN_CHARS
        or repeats > 2
        or groups > 1
        or re.search(r"\(\?|\)\s*[*+?{]", key)
    ):
        raise UnsupportedAdapter(
            f"{name}: {shown(key)} is too involved a pattern; wanted a module name, at most two "
            "plain repetitions and one group"
        )
    try:
        _tail(key)
    except (re.error, OverflowError) as error:
        raise InvalidAdapter(f"{name}: {shown(key)} is no regular expression: {error}") from None


@lru_cache(maxsize=1 << 14)
def _tail(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first key that matches a whole tail of the module's name."""
    for key, value in pattern.items():
        if _tail(key).match(module):
            return value
    return default
