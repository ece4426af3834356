"""The names of an adapter's tensors: which layer each is of, and which part of it.

Raises InvalidAdapter, UnsupportedAdapter, which name the keys.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from lorabatch.errors import InvalidAdapter, UnsupportedAdapter, shown
from lorabatch_worker.adapters.config import AdapterConfig
from lorabatch_worker.adapters.vocabulary import Ends

__all__ = ["assign", "check_parts", "check_saved", "divide"]

# The shortest module that leaves one of the known parts; PEFT puts its own name for the adapter in
# between where it does not leave it out.
KEY = re.compile(
    r"^base_model\.model\.(?P<module>.+?)\.(?:"
    r"(?P<lora_A>lora_A(?:\.\w+)?\.weight)|"
    r"(?P<lora_B>lora_B(?:\.\w+)?\.weight)|"
    r"(?P<lora_B_bias>lora_B(?:\.\w+)?\.bias)|"
    r"(?P<lora_magnitude_vector>lora_magnitude_vector(?:\.\w+)?)|"
    r"(?P<bias>(?:base_layer\.)?bias)|"
    # The base's own, which PEFT writes of both ends; and, beside the weight, what it wraps.
    r"(?P<base_weight>(?:token_adapter\.)?base_layer\.weight)|"
    r"(?P<original_weight>original_module\.weight)|"
    r"(?P<saved_weight>modules_to_save(?:\.\w+)?\.weight)|"
    r"(?P<lora_embedding_A>lora_embedding_A(?:\.\w+)?)|"
    r"(?P<lora_embedding_B>lora_embedding_B(?:\.\w+)?)|"
    r"(?P<trainable_tokens_delta>token_adapter\.trainable_tokens_delta(?:\.\w+)?)|"
    r"(?P<weight>weight))$"  # of modules_to_save
)
Found = dict[str, dict[str, str]]
SITE = {"lora_A", "lora_B", "lora_B_bias", "lora_magnitude_vector", "bias", "base_weight"}
END = {"weight", "trainable_tokens_delta", "base_weight", "original_weight", "saved_weight"}
EMBEDDING = END | {"lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
SHOWN_KEYS = 3


def assign(
    keys: list[str],
    layers: Collection[str],
    ends: Ends | None,
    modules: Collection[str],
) -> Found:
    """{module: {part: key}} of the linear layers and the two ends; every key is consumed, or the
    file is refused. `modules`: all names of the base model."""
    if not keys:
        raise InvalidAdapter("the file holds no tensors")
    found: Found = {}
    unknown, elsewhere, special = [], [], []
    for key in keys:
        match = KEY.match(key)
        if match is None:
            unknown.append(key)
        elif match.lastgroup in _parts_of(match["module"], layers, ends):
            parts, part = found.setdefault(match["module"], {}), match.lastgroup
            assert part is not None
            if part in parts:
                raise InvalidAdapter(f"{parts[part]} and {key} are the same tensor twice")
            parts[part] = key
        elif match["module"] in modules:
            special.append(key)
        else:
            elsewhere.append(key)
    if unknown:
        raise UnsupportedAdapter(
            f"not supported: {_some(unknown)}: no tensor that PEFT's LoRA is known to write"
        )
    if special:
        raise UnsupportedAdapter(
            f"not supported: {_some(special)}: no change that can be made to this layer here"
        )
    if elsewhere:
        raise InvalidAdapter(
            f"the base model has no such layer: {_some(elsewhere)}; trained on another base model?"
        )
    return found


def check_saved(found: Found, config: AdapterConfig) -> None:
    """What the configuration says was trained besides LoRA must be there."""
    for name in config.saved:
        if not any(f".{m}".endswith(f".{name}") and "weight" in found[m] for m in found):
            raise InvalidAdapter(
                f"modules_to_save names {shown(name)}, of which the file has no weight"
            )
    if config.token_indices and not any(
        "trainable_tokens_delta" in parts for parts in found.values()
    ):
        raise InvalidAdapter("trainable_token_indices, but the file has no trainable_tokens_delta")


def divide(found: Found, ends: Ends | None, resized: bool) -> Found:
    """What is of linear layers and not of the model's two ends; LoRA of the head is, unless it is
    for another number of tokens."""
    sites: Found = {}
    for module, keys in found.items():
        whole = ends and (module == ends.embedding or (resized and module == ends.head))
        some = {} if whole else {part: key for part, key in keys.items() if part not in END}
        if some:
            sites[module] = some
    return sites


def _parts_of(module: str, layers: Collection[str], ends: Ends | None) -> set[str]:
    if ends is not None and module == ends.embedding:
        return EMBEDDING
    if ends is not None and module == ends.head:
        return (SITE if module in layers else set()) | END
    return SITE if module in layers else set()


def check_parts(module: str, parts: Mapping[str, str], config: AdapterConfig) -> None:
    """What the configuration says must be there of a linear layer, and nothing else."""
    lora = "lora_A" in parts or "lora_B" in parts
    wanted = {
        "lora_A": lora,
        "lora_B": lora,
        "lora_magnitude_vector": lora and config.use_dora,
        "lora_B_bias": lora and config.lora_bias,
    }
    lacking = [part for part, needed in wanted.items() if needed and part not in parts]
    beyond = [part for part, needed in wanted.items() if not needed and part in parts]
    if "bias" in parts and config.bias == "none":
        beyond.append("bias")
    if lacking or beyond:
        others = " and ".join(sorted(set(parts) - set(beyond))) or "nothing"
        odd = f"{others} without {lacking[0]}" if lacking else f"{beyond[0]} beside {others}"
        raise InvalidAdapter(
            f"{module}: {odd}, where the config has use_dora {config.use_dora}, lora_bias "
            f"{config.lora_bias}, bias {config.bias!r}"
        )


def _some(keys: Iterable[str]) -> str:
    listed = sorted(keys)
    more = f" and {len(listed) - SHOWN_KEYS} more" if len(listed) > SHOWN_KEYS else ""
    return ", ".join(listed[:SHOWN_KEYS]) + more
