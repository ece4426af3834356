"""Several adapters merged into one: linear, TIES, DARE (arXiv 2306.01708, 2311.03099).

What is computed is what PEFT's `add_weighted_adapter` computes: a and b of a layer are merged
apart, each adapter's share w * scale divided between them as its root, the sign on a. So a linear
merge is not the sum of what the adapters do: each one's a meets every other's b. An adapter
without a layer has no part in that layer. Otherwise than in PEFT, the result is not scaled by
sqrt(rank) where the first adapter is one of rsLoRA. LoRAX, whose fields these are, puts all of w
on both a and b and takes the first adapter's scale. Chat template and defaults are kept where all
adapters have the same.

In fp32; the result is of scale 1 and lies in one piece of memory, of the inputs' dtype and layout,
pinned if theirs is. What DARE drops follows from the version, on any machine and with any torch.
Raises InvalidAdapter, UnsupportedAdapter. Does not cover: unequal ranks in one layer, DoRA and
biases, changed embeddings and heads.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lorabatch.errors import InvalidAdapter, UnsupportedAdapter
from lorabatch.job import MergedAdapters
from lorabatch_kernels import LoraWeights
from lorabatch_kernels.weights import Arena, elements
from lorabatch_worker.adapters.weights import Adapter

__all__ = ["kept_at_random", "kept_largest", "merge", "merged_version"]

WORD = 1 << 32
Shipped = TypeVar("Shipped")


def merge(name: str, adapters: Sequence[Adapter], spec: MergedAdapters) -> Adapter:
    """The adapters of `spec.ids`, in this order, as one, which is called `name`. What an adapter is
    called itself does not matter: the same files may have been read under another name."""
    for adapter_id, adapter in zip(spec.ids, adapters, strict=True):
        _check_mergeable(name, adapter_id, adapter)
    version = merged_version(adapters, spec)
    template = _common([adapter.chat_template for adapter in adapters])
    defaults = _common([adapter.defaults for adapter in adapters])
    sites = _sites(name, adapters, spec, version)
    return Adapter(name, version, sites, template, defaults=defaults)


def merged_version(adapters: Sequence[Adapter], spec: MergedAdapters) -> str:
    """sha256 of the request and of the adapters' versions, in order."""
    lines = "\n".join([spec.canonical, *(adapter.version for adapter in adapters)])
    return hashlib.sha256(lines.encode()).hexdigest()


def _common(values: Sequence[Shipped | None]) -> Shipped | None:
    """What all adapters ship alike; None if one has another or none."""
    return values[0] if all(value == values[0] for value in values) else None


def _check_mergeable(name: str, adapter_id: str, adapter: Adapter) -> None:
    where = next((module for module, site in adapter.sites.items() if site.is_affine), None)
    has = f"DoRA, lora_bias or bias on {where}" if where is not None else ""
    if adapter.vocabulary is not None:
        has = "an embedding or output head of its own, or LoRA of the embedding"
    elif adapter.tokenizer is not None:
        has = "tokens of its own"
    if has:
        raise UnsupportedAdapter(
            f"{name}: adapter {adapter_id!r} has {has}, which cannot be merged; leave it "
            "out of merged_adapters"
        )


def _sites(
    name: str, adapters: Sequence[Adapter], spec: MergedAdapters, version: str
) -> dict[str, LoraWeights]:
    """All layers that any of the adapters has."""
    owners: dict[str, dict[str, LoraWeights]] = {}
    for adapter_id, adapter in zip(spec.ids, adapters, strict=True):
        for module, site in adapter.sites.items():
            owners.setdefault(module, {})[adapter_id] = site
    for module, own in owners.items():
        _check_ranks(name, module, own)
    if not owners:
        return {}
    arena = _memory([next(iter(own.values())) for own in owners.values()])
    made = {m: _site(f"{version}/{m}", own, spec, arena) for m, own in owners.items()}
    for module, site in made.items():
        if not (torch.isfinite(site.a).all() and torch.isfinite(site.b).all()):
            raise InvalidAdapter(f"{name}: {module} is NaN or infinite merged (as {site.dtype})")
    return made


def _check_ranks(name: str, module: str, own: Mapping[str, LoraWeights]) -> None:
    if len({site.rank for site in own.values()}) > 1:
        ranks = ", ".join(f"{site.rank} of {adapter_id!r}" for adapter_id, site in own.items())
        raise InvalidAdapter(
            f"{name}: {module} has ranks {ranks}; wanted the same rank of all that are merged"
        )


def _memory(like: Sequence[LoraWeights]) -> Arena:
    """For layers of these sizes, such as theirs."""
    sizes = [elements(w.rank, w.in_features, w.out_features, False) for w in like]
    memory, paneled = like[0].memory, like[0].paneled
    return Arena(sizes, memory.dtype, pinned=memory.is_pinned(), paneled=paneled)


def _site(
    label: str, own: Mapping[str, LoraWeights], spec: MergedAdapters, arena: Arena
) -> LoraWeights:
    """One layer, of the adapters that have it. `label`: from which DARE draws."""
    weights = dict(zip(spec.ids, spec.weights, strict=True))
    shares = [weights[adapter_id] * site.scale for adapter_id, site in own.items()]
    roots = [math.sqrt(abs(share)) for share in shares]
    signed = [math.copysign(root, share) for root, share in zip(roots, shares, strict=True)]
    labels = [f"{label}/{adapter_id}" for adapter_id in own]
    a = _combine([w.a for w in own.values()], signed, [f"{x}/a" for x in labels], spec)
    b = _combine([w.b.t() for w in own.values()], roots, [f"{x}/b" for x in labels], spec)
    return arena.place(a, b.t(), 1.0)


def _combine(
    tensors: Sequence[Tensor], weights: Sequence[float], labels: Sequence[str], spec: MergedAdapters
) -> Tensor:
    """fp32 [rank, n] of tensors of the same shape."""
    parts = torch.stack([tensor.float() for tensor in tensors])
    if spec.density is not None and spec.density < 1:
        parts = _pruned(parts, spec.density, labels, spec.merge_strategy.startswith("dare"))
    weighted = parts * torch.tensor(weights, dtype=torch.float32)[:, None, None]
    if spec.majority_sign_method is None:
        return weighted.sum(0)
    # The adapters' own signs are counted, whatever their weights.
    votes = parts if spec.majority_sign_method == "total" else parts.sign()
    agrees = parts.sign() == torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp_(min=1)


def _pruned(parts: Tensor, density: float, labels: Sequence[str], at_random: bool) -> Tensor:
    """Each adapter's share alone: fp32 [adapters, rank, n], what is not kept 0."""
    if not at_random:
        return parts * torch.stack([kept_largest(part, density) for part in parts])
    own = zip(parts, labels, strict=True)
    kept = [kept_at_random(part, density, label) for part, label in own]
    return parts * torch.stack(kept) / density  # so that the mean stays what it was


def kept_largest(values: Tensor, density: float) -> Tensor:
    """bool, like `values`: the `density` of them that are farthest from 0; of equals, which are
    many in bf16, the first."""
    size, count = values.abs().flatten(), int(density * values.numel())
    if not count:
        return torch.zeros_like(values, dtype=torch.bool)
    least = size.kthvalue(size.numel() - count + 1).values
    beyond, at_least = size > least, size == least
    kept = beyond | (at_least & (at_least.cumsum(0) <= count - beyond.sum()))
    return kept.view(values.shape)


def kept_at_random(values: Tensor, density: float, label: str) -> Tensor:
    """bool, like `values`: each is kept with probability `density`, below 1. What is drawn is
    SHAKE-256 of the label, because torch's own differs between machines and versions."""
    stream = bytearray(hashlib.shake_256(label.encode()).digest(4 * values.numel()))
    draws = torch.frombuffer(stream, dtype=torch.int32) if stream else torch.empty(0)
    return (draws < int(density * WORD) - WORD // 2).view(values.shape)
