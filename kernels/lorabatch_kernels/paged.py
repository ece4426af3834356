"""Attention over a KV cache of blocks that lie anywhere, for a GPU.

    out[t, h] = softmax(scale * q[h, t] . k[g]) v[g]      g the key-value head of query head h

over the positions of t's own sequence up to its own, or the last `window` of them. The sequence's
position p lies in block `blocks[s, p // block_size]` at offset p % block_size. `store_paged` puts
the new keys and values there first.

Shapes and dtypes, bf16, fp16 or fp32 alike: query [Hq, T, D], key [Hkv, T, D], value [Hkv, T, Dv];
pools keys [Hkv, N, block_size, D], values [Hkv, N, block_size, Dv]; any strides but the last, which
is 1; index int64 [T], block * block_size + offset, -1: not stored; out [T, Hq, Dv]; sinks [Hq].
Softmax and sums are fp32. Tokens of no run are not written.

Raises nothing of its own. Does not cover: gradients, additive biases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PagedSpans:
    """Runs of new tokens, one a sequence, in the order of the flat batch; int32.

    starts [S + 1]: run s is tokens [starts[s], starts[s + 1]); an empty run is padding.
    lengths [S]: positions up to and with the run's last token.
    blocks [S, B]: where they lie; entries past a run's length mean nothing.
    longest_run: the most tokens of a run, known to the host.
    """

    starts: Tensor
    lengths: Tensor
    blocks: Tensor
    longest_run: int


def store_paged(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, index: Tensor) -> None:
    """Put the new keys and values into their places in the pools."""
    if key.device.type == "cuda":
        from lorabatch_kernels.paged_triton import store  # a CPU process needs no triton

        store(keys, values, key, value, index)
        return
    kept = (index >= 0).nonzero()[:, 0]
    block, offset = index[kept] // keys.shape[2], index[kept] % keys.shape[2]
    for pool, new in ((keys, key), (values, value)):
        pool[:, block, offset] = new[:, kept]


def attend_paged(
    out: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    spans: PagedSpans,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Write every token's attention into `out`; its own key and value are stored already."""
    if query.device.type == "cuda":
        from lorabatch_kernels.paged_triton import attend

        attend(out, query, keys, values, spans, scale, window, softcap, sinks)
        return
    attend_paged_reference(out, query, keys, values, spans, scale, window, softcap, sinks)


def attend_paged_reference(
    out: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    spans: PagedSpans,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """What `attend_paged` says, run by run in fp32, from each run's own positions alone."""
    starts = spans.starts.tolist()
    per_group = query.shape[0] // keys.shape[0]
    for s, length in enumerate(spans.lengths.tolist()):
        run = slice(starts[s], starts[s + 1])
        count = run.stop - run.start
        if count == 0:
            continue
        held = spans.blocks[s, : -(-length // keys.shape[2])].long()
        k, v = (pool[:, held].flatten(1, 2)[:, :length].float() for pool in (keys, values))
        k, v = k.repeat_interleave(per_group, 0), v.repeat_interleave(per_group, 0)
        scores = query[:, run].float() @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(length, device=query.device)
        own = torch.arange(length - count, length, device=query.device)[:, None]
        seen = position <= own
        if window is not None:
            seen &= position > own - window
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            sink = sinks.float()[:, None, None].expand(-1, count, 1)
            scores = torch.cat([scores, sink], dim=-1)
        p = scores.softmax(dim=-1)[..., :length]
        out[run] = (p @ v).transpose(0, 1).to(out.dtype)
