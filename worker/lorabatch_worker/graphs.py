"""Decode steps as CUDA graphs: recorded once a size, then repeated with other contents.

A step in which every sequence has one token is padded to the next size and written, in one copy,
into tensors that stay where they are. A graph is known by its number of sequences and by whether
any of them has an adapter, so a change of adapters records nothing anew. All other steps, and
batches beyond the largest size, run as they come.

`capture` is what records: it is given a call over fixed tensors and gives back what repeats it.
Raises nothing of its own: a model that cannot be recorded, because it asks the device for numbers
as some mixtures of experts do, runs without graphs, and the log says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog
import torch
from torch import Tensor

from lorabatch_kernels import tile_bound
from lorabatch_kernels.step_map import tile_for
from lorabatch_worker.scheduler import Chunk
from lorabatch_worker.step import Padding, Step, lay_out_step

__all__ = ["MAX_SEQS", "Capture", "CudaCapture", "DecodeGraphs", "GraphSizes", "bucket_sizes"]

log = structlog.get_logger(__name__)

Capture = Callable[[Callable[[], None]], Callable[[], None]]

MAX_SEQS = 512


@dataclass(frozen=True)
class GraphSizes:
    """What does not change: sequences at once, adapter slots, and the cache's blocks."""

    max_seqs: int
    adapter_slots: int
    block_size: int
    max_context_tokens: int


@dataclass(frozen=True)
class _Graph:
    padding: Padding
    inputs: Tensor
    replay: Callable[[], None]


def bucket_sizes(max_seqs: int) -> list[int]:
    """1, 2, 4, then multiples of 8, until `max_seqs` (MAX_SEQS at most) fit."""
    most = min(max_seqs, MAX_SEQS)
    sizes = [1, 2, 4, *range(8, most + 8, 8)]
    return [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < most]


class DecodeGraphs:
    """The graphs of one model. Used from one thread, the one that called `warm_up`."""

    def __init__(
        self,
        forward: Callable[[Step], Tensor],
        sizes: GraphSizes,
        device: torch.device,
        capture: Capture,
    ) -> None:
        """`forward` gives the logits [samples, vocabulary] of a step."""
        self.replays = 0
        self._forward = forward
        self._sizes = sizes
        self._device = device
        self._capture = capture
        self._buckets = bucket_sizes(sizes.max_seqs)
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        self._logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[], None]) -> None:
        """Record all of them, largest first, so that the others fit into its memory; `progress` is
        called after each. Takes seconds."""
        started = time.monotonic()
        for seqs in reversed(self._buckets):
            for adapters in (True, False):
                try:
                    self._graphs[seqs, adapters] = self._record(seqs, adapters)
                except Exception as error:  # noqa: BLE001 - a model may fail in any way under capture
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    log.warning("decode steps run without graphs", seqs=seqs, error=reason)
                    return
                progress()
        log.info("graphs recorded", count=len(self), seconds=round(time.monotonic() - started, 1))

    def run(self, chunks: list[Chunk]) -> Tensor | None:
        """Logits [n, vocabulary] of n decode tokens, which hold until the next call; None where no
        graph fits."""
        if not all(c.end - c.start == 1 and c.samples for c in chunks):
            return None
        seqs = next((size for size in self._buckets if size >= len(chunks)), 0)
        graph = self._graphs.get((seqs, any(c.sequence.slot >= 0 for c in chunks)))
        if graph is None:
            return None
        host = lay_out_step(chunks, self._sizes.block_size, self._device, padding=graph.padding)
        host.packed.send(self._device, into=graph.inputs)
        graph.replay()
        self.replays += 1
        assert self._logits is not None
        return self._logits[: len(chunks)]

    def _record(self, seqs: int, adapters: bool) -> _Graph:
        padding = self._padding(seqs, adapters)
        host = lay_out_step([], self._sizes.block_size, self._device, padding=padding)
        if adapters:
            host = replace(host, step_map=replace(host.step_map, active=(0,)))
        inputs = host.packed.send(self._device)
        step = host.on(inputs)
        # Once as it comes: what is compiled or allocated on first use must not be recorded.
        logits = self._forward(step)
        if self._logits is None:
            self._logits = torch.empty_like(logits)
        out = self._logits[:seqs]

        def call() -> None:
            out.copy_(self._forward(step))

        return _Graph(padding, inputs, self._capture(call))

    def _padding(self, seqs: int, adapters: bool) -> Padding:
        sizes = self._sizes
        slots = sizes.adapter_slots if adapters else 0
        tiles = tile_bound(seqs, slots, tile_for(self._device))
        blocks = -(-sizes.max_context_tokens // sizes.block_size)
        return Padding(seqs, blocks, tiles)


class CudaCapture:
    """Records into CUDA graphs that share their memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        before = torch.cuda.current_stream()
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            call()
        before.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": other threads may pin memory for adapters meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                call()
        finally:
            torch.cuda.set_stream(before)
        return graph.replay
