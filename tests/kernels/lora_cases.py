"""What the kernel tests share: a named tolerance, sites of odd ranks, and batches of tokens."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabatch_kernels import LoraSite, SiteGroup, add_lora_reference
from lorabatch_kernels.group import GroupPool
from lorabatch_kernels.site import PanelSite, PooledSite
from lorabatch_kernels.step_map import group_tokens
from lorabatch_kernels.tiles import TileMap, lay_out_tiles, to_device
from lorabatch_kernels.weights import BESIDE

# Relative root-mean-square error allowed by dtype: rounding of inputs, v and y, not luck.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def assert_close(name: str, ref: Tensor, out: Tensor, ratio: float) -> None:
    """The error's root mean square stays under `ratio` of the reference's; no NaN, no infinity."""
    assert ref.shape == out.shape, f"{name}: {list(out.shape)}, wanted {list(ref.shape)}"
    assert torch.isfinite(out).all(), (
        f"{name}: {int((~torch.isfinite(out)).sum())} cells not finite"
    )
    error = (ref.double() - out.double()).square().mean().sqrt().item()
    size = ref.double().square().mean().sqrt().item()
    assert size > 0, f"{name}: the reference is zero, so this comparison proves nothing"
    assert error <= ratio * size, f"{name}: error {error / size:.2e}, wanted {ratio:.0e} or less"


def fill(
    site: LoraSite, ranks: Mapping[int, int], seed: int = 0, affine: Collection[int] = ()
) -> LoraSite:
    """Load an adapter of the given rank into each slot, with gain and shift into those of `affine`;
    slots left out stay empty. In a pool they lie close together, the last one first."""
    draw = torch.Generator().manual_seed(seed)
    end = 1 + sum(ranks.values()) + BESIDE * len(affine)
    for slot, rank in ranks.items():
        end -= rank + BESIDE * (slot in affine)
        a = torch.randn(rank, site.in_features, generator=draw) / math.sqrt(site.in_features)
        b = torch.randn(site.out_features, rank, generator=draw)
        both = torch.randn(2, site.out_features, generator=draw)
        rows = (both[0], both[1]) if slot in affine else None
        site.load(slot, a, b, 0.5 + 0.25 * slot, None if isinstance(site, PanelSite) else end, rows)
    return site


def poison_the_rest(site: LoraSite) -> LoraSite:
    """Rows of the pool that no slot has, which no kernel may read."""
    assert isinstance(site, PooledSite)
    free = torch.ones(len(site.a), dtype=torch.bool)
    unread = free.clone()
    for start, rank, affine in zip(site.starts, site.ranks, site.affines, strict=True):
        free[start : start + rank + BESIDE * affine] = False
        unread[start : start + rank] = False
    assert free.any()
    site.a[unread] = float("nan")
    site.b[free] = float("nan")
    return site


def alone(site: LoraSite) -> SiteGroup:
    """The group of a site by itself."""
    if isinstance(site, PanelSite):
        return SiteGroup((site,))
    assert isinstance(site, PooledSite)
    tables = (table[None] for table in (site.row0, site.rank, site.affine, site.scale))
    return SiteGroup((site,), GroupPool(site.a[None], site.b, *tables))


@dataclass(frozen=True)
class Shape:
    """One case: which slot each token has, the ranks, and the sizes of the linear layer."""

    slots: Sequence[int]
    ranks: Mapping[int, int]
    in_features: int = 70
    out_features: int = 50
    max_rank: int = 64
    affine: Collection[int] = ()

    def site(
        self, dtype: torch.dtype, device: str = "cpu", paneled: bool | None = None
    ) -> LoraSite:
        sizes = (max(self.ranks) + 2, self.max_rank, self.in_features, [self.out_features])
        group = SiteGroup.allocate(*sizes, dtype, device, paneled=paneled)
        return fill(group.sites[0], self.ranks, affine=self.affine)

    def x_y(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(1)
        tokens = len(self.slots)
        x = torch.randn(tokens, self.in_features, generator=draw)
        y = torch.randn(tokens, self.out_features, generator=draw)
        return x.to(device, dtype), y.to(device, dtype)


def group_of(
    ranks: Sequence[Mapping[int, int]],
    in_features: int,
    out_features: Sequence[int],
    dtype: torch.dtype,
    device: str = "cpu",
    max_rank: int = 40,
) -> SiteGroup:
    """A group with a pool, whose sites have these ranks by slot, and NaN wherever nothing is."""
    sizes = (5, max_rank, in_features, out_features)
    group = SiteGroup.allocate(*sizes, dtype, device, paneled=False)
    for number, (site, loaded) in enumerate(zip(group.sites, ranks, strict=True)):
        poison_the_rest(fill(site, loaded, number, affine=list(loaded)[number % 2 :]))
    return group


def group_reference(y: Tensor, x: Tensor, group: SiteGroup, slots: Sequence[int]) -> Tensor:
    """`add_lora_reference` of all sites side by side."""
    parts = zip(group.split(y), group.sites, strict=True)
    return torch.cat([add_lora_reference(part, x, site, slots) for part, site in parts], dim=1)


def tiles_of(
    slots: Sequence[int],
    tile: int = 16,
    max_tiles: int | None = None,
    buffer: Tensor | None = None,
    base_tiles: bool = True,
) -> TileMap:
    """These tokens' tiles on a CPU, of any size that a kernel takes."""
    ints, *tiles = lay_out_tiles(*group_tokens(slots), tile, max_tiles, base_tiles)
    return TileMap(tile, len(slots), *tiles, to_device(ints, torch.device("cpu"), buffer))


def rows_of_base(slots: Sequence[int]) -> Tensor:
    return torch.tensor([slot < 0 for slot in slots])


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit, so that -0.0 differs from 0.0 and a NaN equals itself."""
    whole = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))
