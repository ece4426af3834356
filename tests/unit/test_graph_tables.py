"""The tables of a recorded step have one size, whatever the batch, on a CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch

from lorabatch import Job
from lorabatch_worker.graphs import DecodeGraphs, GraphSizes, bucket_sizes
from lorabatch_worker.scheduler import Chunk
from lorabatch_worker.sequence import Sequence
from lorabatch_worker.step import lay_out_step
from tests.models import claim

SLOTS = 3


def test_sizes_of_batches() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(3) == [1, 2, 4]
    assert bucket_sizes(8) == [1, 2, 4, 8]
    assert bucket_sizes(30) == [1, 2, 4, 8, 16, 24, 32]
    assert max(bucket_sizes(5000)) == 512


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("cuda")], ids=str)
@pytest.mark.parametrize("adapters", [True, False])
def test_any_batch_of_a_size_fits_its_tables(adapters: bool, device: torch.device) -> None:
    sizes = GraphSizes(max_seqs=40, adapter_slots=SLOTS, block_size=8, max_context_tokens=64)
    graphs = DecodeGraphs(lambda step: step.input_ids, sizes, device, lambda call: call)
    for seqs in bucket_sizes(40):
        padding = graphs._padding(seqs, adapters)
        lengths = set()
        for count in range(seqs + 1):
            chunks = [
                Chunk(Sequence(claim(Job(prompt="-")), [1], None), 0, 1) for _ in range(count)
            ]
            for number, chunk in enumerate(chunks):
                chunk.sequence.slot = number % (SLOTS + 1) - 1 if adapters else -1
                chunk.sequence.blocks = [0]
            host = lay_out_step(chunks, 8, device, padding=padding)  # not on the device yet
            lengths.add(len(host.step_map.ints))
        assert len(lengths) == 1
