"""Batches for paged attention, in pools where all that is nobody's is NaN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorabatch_kernels.paged import PagedSpans

NAN = float("nan")
UNTOUCHED = 7.0


@dataclass(frozen=True)
class Attention:
    """One case. runs: (new tokens, positions before them); (0, 0) is padding. `shared`: the runs
    hold the same blocks for that many positions, a multiple of `block_size`, in their past."""

    runs: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    width: int = 32
    value_width: int | None = None
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    shared: int = 0
    padding: int = 0  # tokens of no run, after the last

    def options(self, batch: Batch) -> dict[str, Any]:
        shared = {"window": self.window, "softcap": self.softcap}
        return {"scale": 1.3 * self.width**-0.5, "sinks": batch.sinks, **shared}


@dataclass(frozen=True, eq=False)
class Batch:
    """query, key, value as transformers' models give them: heads next to each other in a token."""

    query: Tensor
    key: Tensor
    value: Tensor
    keys: Tensor
    values: Tensor
    index: Tensor
    spans: PagedSpans
    sinks: Tensor | None
    out: Tensor

    @property
    def tokens(self) -> int:
        """Those of runs."""
        return int(self.spans.starts[-1])


def make(case: Attention, dtype: torch.dtype, device: str = "cpu", seed: int = 3) -> Batch:
    """The past is in the pools, the new tokens are not; `index` says where they go."""
    draw = torch.Generator().manual_seed(seed)
    size, value_width = case.block_size, case.value_width or case.width
    lengths = [count + past for count, past in case.runs]
    needed = [-(-length // size) for length in lengths]
    total = sum(needed) + 3
    free = torch.randperm(total, generator=draw).tolist()
    common = [free.pop() for _ in range(case.shared // size)]
    # What lies past a run's length in the table is another's or nobody's.
    table = torch.randint(total, (len(lengths), max(needed) + 2), generator=draw)
    tokens = sum(count for count, _ in case.runs) + case.padding
    index = torch.full((tokens,), -1)
    keys = torch.full((case.kv_heads, total, size, case.width), NAN)
    values = torch.full((case.kv_heads, total, size, value_width), NAN)
    starts = [0]
    for s, (count, past) in enumerate(case.runs):
        own = common[: needed[s]] if past >= case.shared else []
        own = own + [free.pop() for _ in range(needed[s] - len(own))]
        table[s, : needed[s]] = torch.tensor(own, dtype=torch.int64)
        place = torch.tensor([own[p // size] * size + p % size for p in range(count + past)])
        index[starts[-1] : starts[-1] + count] = place[past:]
        for pool in (keys, values):
            old = torch.randn(case.kv_heads, past, pool.shape[3], generator=draw)
            pool.flatten(1, 2)[:, place[:past].long()] = old
        starts.append(starts[-1] + count)
    widths = (case.heads, case.width), (case.kv_heads, case.width), (case.kv_heads, value_width)
    news = (torch.randn(tokens, *shape, generator=draw).to(device, dtype) for shape in widths)
    return Batch(
        *(new.transpose(0, 1) for new in news),
        *(pool.to(device, dtype) for pool in (keys, values)),
        index.to(device),
        PagedSpans(
            *(torch.tensor(ints, dtype=torch.int32, device=device) for ints in (starts, lengths)),
            table.to(device, torch.int32),
            max(count for count, _ in case.runs),
        ),
        torch.randn(case.heads, generator=draw).to(device, dtype) if case.sinks else None,
        torch.full((tokens, case.heads, value_width), UNTOUCHED, dtype=dtype, device=device),
    )


MIXED = Attention(((1, 20), (19, 0), (1, 0), (5, 37), (1, 63), (0, 0)), padding=2)
DECODE = Attention(((1, 0), (1, 15), (0, 0), (1, 90), (1, 31), (1, 64), (0, 0)), padding=1)

CASES = {
    "prefill and decode": MIXED,
    "decode": DECODE,
    "window": Attention(MIXED.runs, window=9),
    "window in decode": Attention(DECODE.runs, window=21),
    "softcap": Attention(MIXED.runs, softcap=1.5),
    "softcap in decode": Attention(DECODE.runs, softcap=1.5),
    "sinks": Attention(MIXED.runs, sinks=True),
    "sinks and window in decode": Attention(DECODE.runs, sinks=True, window=40),
    "one head a group": Attention(MIXED.runs, heads=2),
    "groups of three": Attention(MIXED.runs, heads=6, width=16),
    "multi-query": Attention(((1, 30), (3, 4)), heads=17, kv_heads=1),
    "multi-query in decode": Attention(((1, 30), (1, 4)), heads=17, kv_heads=1),
    "odd widths": Attention(MIXED.runs, width=24, value_width=40),
    "narrow heads in decode": Attention(DECODE.runs, width=8, value_width=5),
    "shared blocks": Attention(((1, 50), (4, 32), (1, 47)), shared=32),
    "shared blocks in decode": Attention(((1, 50), (1, 32), (1, 47)), shared=32),
    "large blocks": Attention(MIXED.runs, block_size=64),
    "odd blocks": Attention(MIXED.runs, block_size=7),
    "only padding": Attention(((0, 0), (0, 0)), padding=3),
}
