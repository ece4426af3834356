"""Sites of layers that are always given the same input, such as q, k and v: one call serves all.

On a GPU the sites' tensors are views of a `GroupPool`; on a CPU each has its own. Shapes and
dtypes: as site.py, whose tables here have an axis of sites in front.

Raises ValueError for sizes and dtypes that do not fit, naming the value seen.
Does not cover: more than three sites on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lorabatch_kernels import native
from lorabatch_kernels.site import LoraSite, PanelSite, PooledSite
from lorabatch_kernels.weights import BESIDE, lazy_zeros

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_SITES = 3  # of a group on a GPU: expand.py


@dataclass(frozen=True, eq=False)
class GroupPool:
    """A group's sites as the Triton kernels read them: `a` [sites, rows, in_features], `b` [rows,
    out_features of all sites], the tables [sites, slots]."""

    a: Tensor
    b: Tensor
    row0: Tensor
    rank: Tensor
    affine: Tensor
    scale: Tensor

    @classmethod
    def allocate(
        cls,
        slots: int,
        most: int,
        rows: int,
        in_features: int,
        out_features: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> GroupPool:
        """Empty; slot s begins at row s * `most` until something else is put there."""
        count = len(out_features)
        starts = [[slot * most for slot in range(slots)]] * count
        rank = torch.zeros(count, slots, dtype=torch.int32, device=device)
        return cls(
            a=lazy_zeros((count, rows, in_features), dtype, device),
            b=lazy_zeros((rows, sum(out_features)), dtype, device),
            row0=torch.tensor(starts, dtype=torch.int32, device=device),
            rank=rank,
            affine=torch.zeros_like(rank),
            scale=torch.zeros_like(rank, dtype=torch.float32),
        )


@dataclass(frozen=True, eq=False)
class SiteGroup:
    """Sites of one input size that are always given the same input, such as q, k and v. `pool`: on
    a GPU."""

    sites: tuple[LoraSite, ...]
    pool: GroupPool | None = None

    @classmethod
    def allocate(
        cls,
        slots: int,
        max_rank: int,
        in_features: int,
        out_features: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        pool_rows: int | None = None,
        paneled: bool | None = None,
    ) -> SiteGroup:
        """Empty sites, one for each of `out_features`. `paneled` None: on a CPU. `pool_rows`:
        rows of all slots together, where they are a pool; None: the most for each slot."""
        sizes = (slots, max_rank, in_features, min(out_features))
        if min(sizes) < 1:
            raise ValueError(f"(slots, max_rank, in, out) is {sizes}, wanted each 1 or more")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}, wanted one of {DTYPES}")
        where, count = torch.device(device), len(out_features)
        paneled = where.type == "cpu" if paneled is None else paneled
        most = max_rank + BESIDE
        rows = slots * most if pool_rows is None else pool_rows
        if rows < most:
            raise ValueError(f"pool_rows is {rows}, wanted max_rank + {BESIDE}, {most}, or more")
        common: dict[str, Any] = {"slots": slots, "max_rank": max_rank, "dtype": dtype}
        common |= {"in_features": in_features, "device": where}
        if paneled:
            return cls(tuple(PanelSite(out_features=out, **common) for out in out_features))
        if count > MOST_SITES:
            raise ValueError(f"{count} sites share an input, wanted {MOST_SITES} or fewer")
        pool = GroupPool.allocate(slots, most, rows, in_features, out_features, dtype, where)
        b = torch.split(pool.b, list(out_features), dim=1)
        sites = [
            PooledSite(
                out_features=out,
                a=pool.a[i],
                b=b[i],
                row0=pool.row0[i],
                rank=pool.rank[i],
                affine=pool.affine[i],
                scale=pool.scale[i],
                starts=[slot * most for slot in range(slots)],
                **common,
            )
            for i, out in enumerate(out_features)
        ]
        return cls(tuple(sites), pool)

    @property
    def in_features(self) -> int:
        return self.sites[0].in_features

    @property
    def slots(self) -> int:
        return self.sites[0].slots

    @property
    def max_rank(self) -> int:
        return self.sites[0].max_rank

    @property
    def dtype(self) -> torch.dtype:
        return self.sites[0].dtype

    @cached_property
    def out_features(self) -> int:
        """Of all sites."""
        return sum(site.out_features for site in self.sites)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """Views of the sites' columns of `y` [tokens, out_features]."""
        return torch.split(y, [site.out_features for site in self.sites], dim=1)

    @cached_property
    def structs(self) -> Any:
        """The sites as the C kernel reads them; addresses stay, contents change."""
        made, column = [], 0
        for site in self.sites:
            assert isinstance(site, PanelSite)
            made.append(native.Site(site.address, site.out_features, column))
            column += site.out_features
        return (native.Site * len(made))(*made)
