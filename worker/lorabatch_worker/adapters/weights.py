"""An adapter's files, read and checked on the host before anything reaches the device.

Safetensors only. Every key in the file is used or named in an error; shapes, ranks and finite
values are checked against the base model's layers. Layers that the file leaves out stay as they
are. Tensors come in the engine's dtype: a [rank, in], b [out, rank].
Raises InvalidAdapter, UnsupportedAdapter; both leave nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorabatch.errors import InvalidAdapter, UnsupportedAdapter, shown
from lorabatch_worker.adapters.config import AdapterConfig, read_config

__all__ = ["FILES", "Adapter", "AdapterTarget", "SiteWeights", "read_adapter"]

CONFIG, WEIGHTS, TEMPLATE, TOKENIZER = FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "tokenizer_config.json",
)
KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])(?:\.\w+)?\.weight$")
FLOATS = {"F64", "F32", "F16", "BF16"}
MAX_TEMPLATE_BYTES = 1 << 18
SHOWN_KEYS = 3


@dataclass(frozen=True)
class AdapterTarget:
    """What an adapter must fit: the base model's names, layers and limits. `pinned`: it will be
    copied to a GPU, which then need not be waited for."""

    base_names: frozenset[str]
    shapes: Mapping[str, tuple[int, int]]
    modules: frozenset[str]
    max_rank: int
    dtype: torch.dtype
    pinned: bool = False


@dataclass(frozen=True, eq=False)
class SiteWeights:
    """One layer's share: y += scale * (x a^T) b^T."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """A checked adapter in host memory. `version` is the sha256 of its files."""

    adapter_id: str
    version: str
    sites: Mapping[str, SiteWeights]
    chat_template: str | None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for site in self.sites.values() for t in (site.a, site.b))

    @property
    def rank(self) -> int:
        return max((site.a.shape[0] for site in self.sites.values()), default=0)


def read_adapter(adapter_id: str, folder: Path, target: AdapterTarget) -> Adapter:
    """Read and check the adapter in `folder`."""
    try:
        config = read_config(folder / CONFIG)
        _check_base(config, target)
        path = folder / WEIGHTS
        if not path.is_file():
            pickles = [f.name for f in folder.glob("adapter_model.*")]
            found = f"; {pickles[0]} is not read, convert it to safetensors" if pickles else ""
            raise InvalidAdapter(f"{WEIGHTS} is missing{found}")
        version = _digest(folder)
        sites = _read_sites(path, config, target)
        template = _chat_template(folder)
    except InvalidAdapter as error:
        raise type(error)(f"adapter {adapter_id!r}: {error}") from None
    return Adapter(adapter_id, version, sites, template)


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


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in FILES:
        path = folder / name
        if path.is_file():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256")
            digest.update(f"{name}\0{content.hexdigest()}\0".encode())
    return digest.hexdigest()


def _read_sites(path: Path, config: AdapterConfig, target: AdapterTarget) -> dict[str, SiteWeights]:
    try:
        with safe_open(path, framework="pt") as file:
            names = _assign(list(file.keys()), target)
            for module, parts in names.items():
                for part, key in parts.items():
                    piece = file.get_slice(key)
                    _check_shape(key, part, piece.get_shape(), piece.get_dtype(), config, target)
                if set(parts) != {"A", "B"}:
                    (present,) = parts
                    missing = "B" if present == "A" else "A"
                    raise InvalidAdapter(f"{module}: lora_{present} without lora_{missing}")
            return {
                module: SiteWeights(
                    a=_tensor(file.get_tensor(parts["A"]), parts["A"], target),
                    b=_tensor(file.get_tensor(parts["B"]).t(), parts["B"], target).t(),
                    scale=config.scaling_of(module),
                )
                for module, parts in names.items()
            }
    except SafetensorError as error:
        raise InvalidAdapter(f"{path.name} is not a valid safetensors file: {error}") from None


def _assign(keys: list[str], target: AdapterTarget) -> dict[str, dict[str, str]]:
    """{module: {"A": key, "B": key}}; every key is consumed, or the file is refused."""
    if not keys:
        raise InvalidAdapter(f"{WEIGHTS} holds no tensors")
    found: dict[str, dict[str, str]] = {}
    unknown, elsewhere, special = [], [], []
    for key in keys:
        match = KEY.match(key)
        if match is None:
            unknown.append(key)
        elif match["module"] in target.shapes:
            parts = found.setdefault(match["module"], {})
            if match["part"] in parts:
                raise InvalidAdapter(f"{parts[match['part']]} and {key} are the same tensor twice")
            parts[match["part"]] = key
        elif match["module"] in target.modules:
            special.append(key)
        else:
            elsewhere.append(key)
    if unknown:
        raise UnsupportedAdapter(f"not supported: {_some(unknown)}; wanted lora_A and lora_B only")
    if special:
        raise UnsupportedAdapter(
            f"not supported: {_some(special)}: LoRA on layers that are no plain linear layer of "
            "the decoder (embeddings, output head)"
        )
    if elsewhere:
        raise InvalidAdapter(
            f"the base model has no such layer: {_some(elsewhere)}; trained on another base model?"
        )
    return found


def _some(keys: Iterable[str]) -> str:
    listed = sorted(keys)
    more = f" and {len(listed) - SHOWN_KEYS} more" if len(listed) > SHOWN_KEYS else ""
    return ", ".join(listed[:SHOWN_KEYS]) + more


def _check_shape(
    key: str,
    part: str,
    shape: list[int],
    dtype: str,
    config: AdapterConfig,
    target: AdapterTarget,
) -> None:
    module = KEY.match(key)["module"]  # type: ignore[index]
    rank = config.rank_of(module)
    fan_in, fan_out = target.shapes[module]
    wanted = [rank, fan_in] if part == "A" else [fan_out, rank]
    if shape != wanted:
        raise InvalidAdapter(f"{key} is {shape}, wanted {wanted} (rank {rank} of the config)")
    if rank > target.max_rank:
        raise InvalidAdapter(
            f"{key} has rank {rank}, allowed {target.max_rank}: raise LORABATCH_MAX_ADAPTER_RANK"
        )
    if dtype not in FLOATS:
        raise InvalidAdapter(f"{key} is of dtype {dtype}, wanted one of {sorted(FLOATS)}")


def _tensor(tensor: Tensor, key: str, target: AdapterTarget) -> Tensor:
    """As the device will have it, rank rows one after the other."""
    converted = tensor.to(target.dtype)
    if not torch.isfinite(converted).all():
        raise InvalidAdapter(f"{key} holds NaN or infinite values (as {target.dtype})")
    converted = converted.contiguous()
    return converted.pin_memory() if target.pinned else converted


def _chat_template(folder: Path) -> str | None:
    """The adapter's own chat template, if it ships one."""
    path = folder / TEMPLATE
    if path.is_file():
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise InvalidAdapter(f"{TEMPLATE} is over {MAX_TEMPLATE_BYTES} bytes")
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidAdapter(f"{TEMPLATE} is not UTF-8 text: {error}") from None
    path = folder / TOKENIZER
    if not path.is_file():
        return None
    try:
        template = json.loads(path.read_text("utf-8")).get("chat_template")
    except (ValueError, RecursionError, AttributeError):
        raise InvalidAdapter(f"{TOKENIZER} is not a valid JSON object") from None
    if template is not None and not isinstance(template, str):
        raise UnsupportedAdapter(f"chat_template is {shown(template)}, wanted one string")
    return template
