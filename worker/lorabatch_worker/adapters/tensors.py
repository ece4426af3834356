"""adapter_model.safetensors: read and checked against the base model's layers.

Every key in the file is used or named in an error; shapes, ranks and finite values are checked.
Layers that the file leaves out stay as they are. Tensors come in the engine's dtype: a [rank, in],
b [out, rank], gain and shift [out]. Raises InvalidAdapter, UnsupportedAdapter; both leave nothing
behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorabatch.errors import InvalidAdapter, UnsupportedAdapter
from lorabatch_kernels import LoraWeights
from lorabatch_kernels.weights import Arena, elements
from lorabatch_worker.adapters.affine import BaseLayer, affine_of, gain_of
from lorabatch_worker.adapters.base_tokenizer import BaseTokenizer
from lorabatch_worker.adapters.config import AdapterConfig
from lorabatch_worker.adapters.end_tensors import EndTensors, vocabulary_size
from lorabatch_worker.adapters.keys import assign, check_parts, check_saved, divide
from lorabatch_worker.adapters.vocabulary import Ends, VocabularyChange
from lorabatch_worker.linear import BLOCK

__all__ = ["AdapterTarget", "read_tensors"]

FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class AdapterTarget:
    """What an adapter must fit: the base model's names, layers, tokens and limits. `layer` gives a
    layer of `shapes` by name. `pinned`: it will be copied to a GPU, which then need not be waited
    for. `max_context_tokens` and `positions` are BaseModel's."""

    base_names: frozenset[str]
    shapes: Mapping[str, tuple[int, int]]
    modules: frozenset[str]
    max_rank: int
    dtype: torch.dtype
    layer: Callable[[str], BaseLayer]
    ends: Ends | None = None
    pinned: bool = False
    tokenizer: BaseTokenizer | None = None
    max_context_tokens: int | None = None
    positions: int | None = None


def read_tensors(
    path: Path, config: AdapterConfig, target: AdapterTarget
) -> tuple[dict[str, LoraWeights], VocabularyChange | None]:
    """By layer, and of the model's two ends."""
    ends = target.ends
    try:
        with safe_open(path, framework="pt") as file:

            def shape(key: str) -> list[int]:
                return list(file.get_slice(key).get_shape())

            found = assign(list(file.keys()), target.shapes, ends, target.modules)
            check_saved(found, config)
            _check_dtypes(found, file)
            size = vocabulary_size(found, shape, config, ends) if ends else 0
            resized = ends is not None and size != ends.vocabulary
            for module, keys in found.items():
                if "base_weight" in keys:
                    _check_base_weight(keys["base_weight"], module, file, target, size)
            sites = divide(found, ends, resized)
            for module, keys in sites.items():
                check_parts(module, keys, config)
                for part, key in keys.items():
                    _check_shape(key, module, part, shape(key), config, target)
            made = _sites(sites, file.get_tensor, config, target)

            def ready(tensor: Tensor, key: str) -> Tensor:
                """Of the ends. Not the file's memory, which may change."""
                made = _ready(tensor, key, target)
                return made.clone() if made.data_ptr() == tensor.data_ptr() else made

            if ends is None:
                return made, None
            ends_of = EndTensors(file.get_tensor, ready, config, ends, target.max_rank, size)
            return made, ends_of.read(found)
    except SafetensorError as error:
        raise InvalidAdapter(f"{path.name} is not a valid safetensors file: {error}") from None


def _check_dtypes(found: Mapping[str, Mapping[str, str]], file: Any) -> None:
    for keys in found.values():
        for key in keys.values():
            dtype = file.get_slice(key).get_dtype()
            if dtype not in FLOATS:
                raise InvalidAdapter(f"{key} is of dtype {dtype}, wanted one of {sorted(FLOATS)}")


def _check_base_weight(
    key: str, module: str, file: Any, target: AdapterTarget, vocabulary: int
) -> None:
    """It must be what is in use here, but for rounding, as far as the base has its rows."""
    piece = file.get_slice(key)
    ends = target.ends
    blocks: Iterable[Tensor]
    if ends is not None and (module == ends.embedding or (ends.tied and module == ends.head)):
        wanted, blocks = list(ends.weight.shape), torch.split(ends.weight, BLOCK)
    elif module not in target.shapes:
        raise UnsupportedAdapter(f"not supported: {key}, of a head that is no linear layer")
    else:
        wanted, blocks = list(target.shapes[module])[::-1], target.layer(module).weight_blocks()
    if ends is not None and module in (ends.embedding, ends.head):
        wanted[0] = vocabulary
    if list(piece.get_shape()) != wanted:
        raise UnsupportedAdapter(f"{key} is {piece.get_shape()}, wanted {wanted}, the base model's")
    first = 0
    for block in blocks:
        theirs = piece[first : first + len(block)].to(target.dtype).float()
        first += len(block)
        ours = block[: len(theirs)].float().cpu()
        if not torch.allclose(ours, theirs, rtol=2**-7, atol=1e-6):
            raise UnsupportedAdapter(
                f"{key} is not the base model's weight: trained on another base model, or on one "
                "whose weight was changed?"
            )


def _sites(
    found: Mapping[str, Mapping[str, str]],
    tensor: Callable[[str], Tensor],
    config: AdapterConfig,
    target: AdapterTarget,
) -> dict[str, LoraWeights]:
    """In one piece of memory."""
    sizes = [_size(module, keys, config, target) for module, keys in found.items()]
    arena = Arena(sizes, target.dtype, target.pinned, paneled=not target.pinned)
    return {m: _site(m, keys, tensor, config, target, arena) for m, keys in found.items()}


def _site(
    module: str,
    keys: Mapping[str, str],
    tensor: Callable[[str], Tensor],
    config: AdapterConfig,
    target: AdapterTarget,
    arena: Arena,
) -> LoraWeights:
    """Of the tensors of one layer, by part."""
    fan_in, fan_out = target.shapes[module]
    parts = {part: tensor(key) for part, key in keys.items()}
    a, b, scale = torch.zeros(0, fan_in), torch.zeros(fan_out, 0), 1.0
    if "lora_A" in parts:
        a, b, scale = parts["lora_A"], parts["lora_B"], config.scaling_of(module)
    gain, term, affine = None, parts.get("lora_B_bias"), None
    if "lora_magnitude_vector" in parts:
        gain = gain_of(target.layer(module), a, b, scale, parts["lora_magnitude_vector"])
        b = b.float() + gain[:, None] * b.float()
    if gain is not None or term is not None or "bias" in parts:
        layer = target.layer(module)
        if "bias" in parts and layer.bias is None:
            raise InvalidAdapter(f"{keys['bias']}: this layer of the base model has no bias")
        term = None if term is None else term * scale
        affine = affine_of(layer, gain, parts.get("bias"), term, target.dtype)
    return arena.place(
        _finite(a, keys.get("lora_A", module), target),
        _finite(b, keys.get("lora_B", module), target),
        scale,
        affine and (_finite(affine[0], module, target), _finite(affine[1], module, target)),
    )


def _size(
    module: str, keys: Mapping[str, str], config: AdapterConfig, target: AdapterTarget
) -> int:
    rank = config.rank_of(module) if "lora_A" in keys else 0
    return elements(rank, *target.shapes[module], bool(keys.keys() - {"lora_A", "lora_B"}))


def _check_shape(
    key: str,
    module: str,
    part: str,
    shape: list[int],
    config: AdapterConfig,
    target: AdapterTarget,
) -> None:
    rank = config.rank_of(module)
    fan_in, fan_out = target.shapes[module]
    wanted = {"lora_A": [rank, fan_in], "lora_B": [fan_out, rank]}.get(part, [fan_out])
    if shape != wanted:
        raise InvalidAdapter(f"{key} is {shape}, wanted {wanted} (rank {rank} of the config)")
    if part in ("lora_A", "lora_B") and rank > target.max_rank:
        raise InvalidAdapter(
            f"{key} has rank {rank}, allowed {target.max_rank}: raise LORABATCH_MAX_ADAPTER_RANK"
        )


def _ready(tensor: Tensor, key: str, target: AdapterTarget) -> Tensor:
    """As the device will have it."""
    converted = _finite(tensor, key, target).contiguous()
    return converted.pin_memory() if target.pinned and converted.numel() else converted


def _finite(tensor: Tensor, key: str, target: AdapterTarget) -> Tensor:
    """In the engine's dtype."""
    converted = tensor.to(target.dtype)
    # A sum is finite only if all are, and cheaper; too large a sum is looked at again.
    total = converted.sum(dtype=torch.float32)
    if not torch.isfinite(total) and not torch.isfinite(converted).all():
        raise InvalidAdapter(f"{key} holds NaN or infinite values (as {target.dtype})")
    return converted
