"""LoRA on a GPU: shrink, then expand. Two launches a site, both safe to capture in a CUDA graph.

Shapes and dtypes: as shrink.py and expand.py. Grids follow from shapes (`max_tiles`, the site's
`max_rank`), never from an adapter's rank, so that one captured graph serves all adapters.

Raises nothing of its own: lora.py has checked the shapes. Triton launches on the current device:
make y's device the current one.
Does not cover: overlap of shrink with the base GEMM on a side stream.
"""

from __future__ import annotations

from torch import Tensor

from lorabatch_kernels.expand import expand
from lorabatch_kernels.plan import plan_for
from lorabatch_kernels.shrink import shrink
from lorabatch_kernels.site import LoraSite
from lorabatch_kernels.tiles import TileMap
from lorabatch_kernels.tuned import generation


def add_lora_triton(y: Tensor, x: Tensor, site: LoraSite, tiles: TileMap) -> None:
    """Add every token's LoRA term to `y` in place."""
    plan = plan_for(site.in_features, site.max_rank, tiles.tile, site.dtype, generation(y.device))
    planes = shrink(x, site, tiles, plan)
    expand(y, planes, site, tiles, plan)
