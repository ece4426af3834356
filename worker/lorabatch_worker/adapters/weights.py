"""An adapter's files, read and checked on the host before anything reaches the device.

Safetensors only. Every key in the file is used or named in an error; shapes, ranks and finite
values are checked against the base model's layers. Layers that the file leaves out stay as they
are. Tensors come in the engine's dtype: a [rank, in], b [out, rank], gain and shift [out].
Raises InvalidAdapter, UnsupportedAdapter; both leave nothing behind.
"""

from __future__ import annotations

import hashlib
import re
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
from lorabatch_worker.adapters.config import AdapterConfig, read_config
from lorabatch_worker.adapters.defaults import GENERATION, GenerationDefaults, read_defaults
from lorabatch_worker.adapters.keys import assign, check_parts, check_saved, divide
from lorabatch_worker.adapters.template import TEMPLATE, TOKENIZER, read_template
from lorabatch_worker.adapters.vocabulary import Ends, VocabularyChange, read_vocabulary
from lorabatch_worker.linear import BLOCK

__all__ = ["FILES", "Adapter", "AdapterTarget", "read_adapter", "version_of"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS, TEMPLATE, TOKENIZER, GENERATION)
FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class AdapterTarget:
    """What an adapter must fit: the base model's names, layers and limits. `layer` gives a layer of
    `shapes` by name. `pinned`: it will be copied to a GPU, which then need not be waited for."""

    base_names: frozenset[str]
    shapes: Mapping[str, tuple[int, int]]
    modules: frozenset[str]
    max_rank: int
    dtype: torch.dtype
    layer: Callable[[str], BaseLayer]
    ends: Ends | None = None
    pinned: bool = False


@dataclass(frozen=True, eq=False)
class Adapter:
    """A checked adapter in host memory. `version` is the sha256 of its files."""

    adapter_id: str
    version: str
    sites: Mapping[str, LoraWeights]
    chat_template: str | None
    vocabulary: VocabularyChange | None = None
    defaults: GenerationDefaults | None = None

    @property
    def nbytes(self) -> int:
        ends = self.vocabulary.tensors if self.vocabulary else []
        return sum(t.nbytes for t in ends) + sum(w.nbytes for w in self.sites.values())

    @property
    def rank_rows(self) -> int:
        """That it takes on a GPU, the same in every layer."""
        return max((site.rows for site in self.sites.values()), default=0)


def read_adapter(
    adapter_id: str, folder: Path, target: AdapterTarget, version: str | None = None
) -> Adapter:
    """Read and check the adapter in `folder`; `version`: where it is known already."""
    try:
        config = read_config(folder / CONFIG)
        _check_base(config, target)
        path = folder / WEIGHTS
        if not path.is_file():
            pickles = [f.name for f in folder.glob("adapter_model.*")]
            found = f"; {pickles[0]} is not read, convert it to safetensors" if pickles else ""
            raise InvalidAdapter(f"{WEIGHTS} is missing{found}")
        version = version or version_of(folder)
        sites, vocabulary = _read_tensors(path, config, target)
        template = read_template(folder)
        defaults = read_defaults(folder, len(target.ends.weight) if target.ends else None)
    except InvalidAdapter as error:
        raise type(error)(f"adapter {adapter_id!r}: {error}") from None
    return Adapter(adapter_id, version, sites, template, vocabulary, defaults)


def _check_base(config: AdapterConfig, target: AdapterTarget) -> None:
    if config.base_model is None:
        return
    name = last_part(config.base_model)
    if name not in {last_part(known) for known in target.base_names}:
        raise InvalidAdapter(
            f"trained on {config.base_model!r}, but the base model here is "
            f"{sorted(target.base_names)[0]!r}; if they are the same model, add the name to "
            "LORABATCH_BASE_MODEL_ALIASES"
        )


def last_part(name: str) -> str:
    """A model's name without owner, folders and case."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].casefold()


def version_of(folder: Path) -> str:
    """The sha256 of an adapter's files, by their names."""
    digest = hashlib.sha256()
    for name in FILES:
        path = folder / name
        if path.is_file():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256")
            digest.update(f"{name}\0{content.hexdigest()}\0".encode())
    return digest.hexdigest()


def _read_tensors(
    path: Path, config: AdapterConfig, target: AdapterTarget
) -> tuple[dict[str, LoraWeights], VocabularyChange | None]:
    ends = target.ends
    try:
        with safe_open(path, framework="pt") as file:
            found = assign(list(file.keys()), target.shapes, ends, target.modules)
            check_saved(found, config)
            for module, keys in found.items():
                for key in keys.values():
                    dtype = file.get_slice(key).get_dtype()
                    if dtype not in FLOATS:
                        wanted = sorted(FLOATS)
                        raise InvalidAdapter(f"{key} is of dtype {dtype}, wanted one of {wanted}")
                if "base_weight" in keys:
                    _check_base_weight(keys.pop("base_weight"), module, file, target)
            at_ends, sites = divide(found, ends)
            for module, keys in sites.items():
                check_parts(module, keys, config)
                for part, key in keys.items():
                    _check_shape(key, module, part, file.get_slice(key).get_shape(), config, target)
            sizes = [_size(module, keys, config, target) for module, keys in sites.items()]
            arena = Arena(sizes, target.dtype, target.pinned, paneled=not target.pinned)
            made = {
                module: _site(module, keys, file.get_tensor, config, target, arena)
                for module, keys in sites.items()
            }

            def ready(tensor: Tensor, key: str) -> Tensor:
                """Of the ends. Not the file's memory, which may change."""
                made = _ready(tensor, key, target)
                return made.clone() if made.data_ptr() == tensor.data_ptr() else made

            of_ends = read_vocabulary(
                at_ends, file.get_tensor, ready, config, ends, target.max_rank
            )
            return made, of_ends
    except SafetensorError as error:
        raise InvalidAdapter(f"{path.name} is not a valid safetensors file: {error}") from None


def _check_base_weight(key: str, module: str, file: Any, target: AdapterTarget) -> None:
    """It must be what is in use here, but for rounding."""
    piece = file.get_slice(key)
    blocks: Iterable[Tensor]
    if target.ends is not None and module == target.ends.embedding:
        wanted, blocks = list(target.ends.weight.shape), torch.split(target.ends.weight, BLOCK)
    else:
        wanted, blocks = list(target.shapes[module])[::-1], target.layer(module).weight_blocks()
    if piece.get_shape() != wanted:
        raise UnsupportedAdapter(f"{key} is {piece.get_shape()}, wanted {wanted}, the base model's")
    first = 0
    for ours in blocks:
        theirs = piece[first : first + len(ours)].to(target.dtype).float()
        first += len(ours)
        if not torch.allclose(ours.float().cpu(), theirs, rtol=2**-7, atol=1e-6):
            raise UnsupportedAdapter(
                f"{key} is not the base model's weight: trained on another base model, or on one "
                "whose weight was changed?"
            )


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
    if not torch.isfinite(converted).all():
        raise InvalidAdapter(f"{key} holds NaN or infinite values (as {target.dtype})")
    return converted
