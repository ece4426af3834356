"""Paged attention on a real GPU, against its torch reference on the same memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, DECODE, MIXED, UNTOUCHED, Attention, make
from lora_cases import assert_close, same_bits

from lorabatch_kernels import paged_triton
from lorabatch_kernels.paged import attend_paged, attend_paged_reference, store_paged
from lorabatch_kernels.plan import AttentionPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

# The reference does not round probabilities to the dtype of the values; the kernel does.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LIBRARY = AttentionPlan(16, 32, num_warps=4, num_stages=1, library=True)
MODEL = {"heads": 32, "kv_heads": 8, "width": 128}
LONG = tuple((1, past) for past in (0, 1, 4095, 300, 77, 1024))
LARGE = {
    **CASES,
    "8B decode": Attention(LONG, **MODEL),
    "8B decode in a window": Attention(LONG, window=512, sinks=True, **MODEL),
    "8B prefill and decode": Attention(((700, 0), (1, 2000), (33, 500), (1, 31)), **MODEL),
    "SmolLM2": Attention(((300, 0), *LONG), heads=9, kv_heads=3, width=64),
    "wide heads": Attention(((150, 70), (1, 900)), heads=8, kv_heads=4, width=256, softcap=50.0),
    "wide heads in decode": Attention(LONG, heads=8, kv_heads=4, width=256, softcap=50.0),
    "heads of 80": Attention(((150, 70), (1, 900)), heads=32, kv_heads=32, width=80),
    "heads of 96": Attention(LONG, heads=32, kv_heads=8, width=96),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_against_reference(name, dtype):
    case = LARGE[name]
    batch = make(case, dtype, "cuda")
    wanted_keys, wanted_values = batch.keys.cpu(), batch.values.cpu()
    new = (batch.key, batch.value, batch.index)
    store_paged(wanted_keys, wanted_values, *(part.cpu() for part in new))
    store_paged(batch.keys, batch.values, *new)
    assert same_bits(batch.keys.cpu(), wanted_keys)
    assert same_bits(batch.values.cpu(), wanted_values)
    read = (batch.query, batch.keys, batch.values, batch.spans)
    wanted = torch.empty_like(batch.out, dtype=torch.float32)
    attend_paged_reference(wanted, *read, **case.options(batch))
    attend_paged(batch.out, *read, **case.options(batch))
    assert batch.out[batch.tokens :].eq(UNTOUCHED).all()
    if batch.tokens:
        assert_close("o", wanted[: batch.tokens], batch.out[: batch.tokens], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("splits", [2, 8, 32])
def test_any_number_of_splits(splits, dtype, monkeypatch):
    monkeypatch.setattr(paged_triton, "splits_for", lambda *args: splits)
    test_against_reference("8B decode", dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["8B decode", "8B prefill and decode", "SmolLM2", "heads of 80", "heads of 96"]
)
def test_in_torchs_own_operator(name, dtype):
    """Where this torch has none, our kernel takes the call."""
    case = replace(LARGE[name], block_size=256)
    batch = make(case, dtype, "cuda")
    store_paged(batch.keys, batch.values, batch.key, batch.value, batch.index)
    read = (batch.query, batch.keys, batch.values, batch.spans)
    wanted = torch.empty_like(batch.out, dtype=torch.float32)
    attend_paged_reference(wanted, *read, **case.options(batch))
    paged_triton.attend(batch.out, *read, **case.options(batch), plan=LIBRARY)
    assert_close("o", wanted, batch.out, TOLERANCE[dtype])


@pytest.mark.parametrize("case", [DECODE, MIXED], ids=["decode", "mixed"])
def test_a_captured_graph_serves_other_runs_lengths_and_blocks(case, monkeypatch):
    if case is DECODE:
        monkeypatch.setattr(paged_triton, "splits_for", lambda *args: 4)
    batch = make(case, torch.bfloat16, "cuda")
    read = (batch.query, batch.keys, batch.values, batch.spans)

    def step():
        store_paged(batch.keys, batch.values, batch.key, batch.value, batch.index)
        attend_paged(batch.out, *read, **case.options(batch))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed, runs in enumerate((case.runs, case.runs[::-1], ((0, 0), *case.runs[:-1]))):
        other = make(replace(case, runs=runs), torch.bfloat16, "cuda", seed)
        for name in ("query", "key", "value", "keys", "values", "index", "out"):
            getattr(batch, name).copy_(getattr(other, name))
        for name in ("starts", "lengths", "blocks"):
            getattr(batch.spans, name).copy_(getattr(other.spans, name))
        graph.replay()
        wanted = torch.empty_like(batch.out, dtype=torch.float32)
        attend_paged_reference(wanted, *read, **case.options(batch))
        tokens = other.tokens
        assert_close("o", wanted[:tokens], batch.out[:tokens], TOLERANCE[torch.bfloat16])
        assert batch.out[tokens:].eq(UNTOUCHED).all()
