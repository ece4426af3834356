"""LoRA on a GPU: shrink, then expand. Two launches a group, both safe to capture in a CUDA graph.

    shrinking = Shrinking(x, group, tiles)    before the base product y = x W^T, or after it
    shrinking.add_to(y)                       after it; or gate, rotate or sum, which read y next

Where the plan says so, shrink runs on a stream of its own beside the product, and expand inside of
what reads y next (expand_into.py). Shapes and dtypes: as shrink.py and expand.py. Grids follow from
shapes (`max_tiles`, the group's `max_rank`), never from an adapter's rank, so that one captured
graph serves all adapters.

Raises nothing of its own: lora.py has checked the shapes. Triton launches on the current device:
make y's device the current one.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lorabatch_kernels.expand import expand
from lorabatch_kernels.expand_into import expand_gate, expand_rotary, expand_sum
from lorabatch_kernels.group import SiteGroup
from lorabatch_kernels.plan import Plan, plan_for
from lorabatch_kernels.rows import rotary_, silu_gate
from lorabatch_kernels.shrink import new_planes, shrink
from lorabatch_kernels.tiles import TileMap
from lorabatch_kernels.tuned import generation


@lru_cache(maxsize=64)
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for what runs beside a product."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Shrinking:
    """Of one input. All that is allocated belongs to the current stream, which the other one waits
    for at its start and is waited for by at its end, so that no block is used again too early."""

    def __init__(
        self, x: Tensor, group: SiteGroup, tiles: TileMap, plan: Plan | None = None
    ) -> None:
        """`plan`: None for the one of these sizes."""
        sizes = group.in_features, group.out_features, group.max_rank, tiles.tile, group.dtype
        self.group, self.tiles = group, tiles
        self.plan = plan or plan_for(*sizes, generation(x.device))
        self.planes = new_planes(x, group, self.plan)
        self._beside: torch.cuda.Stream | None = None
        if not self.plan.beside:
            shrink(self.planes, x, group, tiles, self.plan)
            return
        self._beside = side_stream(x.device)
        self._beside.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._beside):
            shrink(self.planes, x, group, tiles, self.plan)

    def _wait(self) -> None:
        if self._beside is not None:
            torch.cuda.current_stream(self.planes.device).wait_stream(self._beside)

    def add_to(self, y: Tensor) -> None:
        """y [tokens, columns of all sites] += the terms."""
        self._wait()
        expand(y, self.planes, self.group, self.tiles, self.plan)

    def sum(self, total: Tensor, y: Tensor) -> None:
        """total [tokens, columns] += y of one site with the terms, which may be left out of y."""
        if self.plan.fused:
            self._wait()
            expand_sum(total, y, self.planes, self.group, self.tiles, self.plan)
            return
        self.add_to(y)
        total.add_(y)

    def gate(self, y: Tensor) -> Tensor:
        """`silu_gate` of y [tokens, 2 * width] with the terms, which may be left out of y."""
        if not self.plan.fused:
            self.add_to(y)
            return silu_gate(y)
        self._wait()
        return expand_gate(y, self.planes, self.group, self.tiles, self.plan)

    def rotate(self, y: Tensor, cos: Tensor, sin: Tensor) -> None:
        """y [tokens, columns of q, k and v] with the terms, and q and k turned, in place."""
        if self.plan.fused:
            self._wait()
            expand_rotary(y, cos, sin, self.planes, self.group, self.tiles, self.plan)
            return
        self.add_to(y)
        *turned, _ = (site.out_features for site in self.group.sites)
        rotary_(y[:, : sum(turned)], cos, sin)
