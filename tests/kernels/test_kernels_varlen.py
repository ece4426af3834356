"""torch's own paged attention: when it is taken, and that it is asked for what paged.py says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, DECODE, MIXED, UNTOUCHED, Attention, make
from lora_cases import assert_close

from lorabatch_kernels import paged_triton, paged_varlen
from lorabatch_kernels.paged import attend_paged_reference, store_paged
from lorabatch_kernels.plan import AttentionPlan

LIBRARY = AttentionPlan(16, 32, num_warps=4, num_stages=1, library=True)
BLOCKS = {"block_size": 256}
PLAIN = [
    name
    for name, case in CASES.items()
    if case.softcap is None and not case.sinks and (case.value_width or case.width) == case.width
]
IN_ORDER = Attention(((1, 0), (1, 15), (1, 90), (1, 300), (0, 0)), padding=1)


def documented(
    out,
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale,
    window_size,
    enable_gqa,
    seqused_k,
    block_table,
):
    """What torch's page on `varlen_attn` says of these arguments, run by run in fp32."""
    assert cu_seq_k is None
    assert enable_gqa
    assert {t.dtype for t in (cu_seq_q, seqused_k, block_table)} == {torch.int32}
    assert block_table.shape[0] == len(seqused_k) == len(cu_seq_q) - 1
    assert max_k >= seqused_k.max()
    left, right = window_size
    for s, length in enumerate(seqused_k.tolist()):
        run = slice(*cu_seq_q[s : s + 2].tolist())
        count = run.stop - run.start
        assert count <= max_q
        if count == 0:
            continue
        pages = block_table[s, : -(-length // key.shape[1])].long()
        k, v = (pool[pages].flatten(0, 1)[:length].float() for pool in (key, value))
        shared = query.shape[1] // key.shape[2]
        k, v = (part.repeat_interleave(shared, 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query[run].float() * scale, k)
        own = torch.arange(length - count, length)[:, None]
        position = torch.arange(length)
        hidden = torch.zeros(count, length, dtype=torch.bool)
        if right >= 0:
            hidden |= position > own + right
        if left >= 0:
            hidden |= position < own - left
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[run] = torch.einsum("hqk,khd->qhd", p, v).to(out.dtype)


@pytest.fixture
def asked(monkeypatch):
    """The keyword arguments of every call to torch's operator, which is what its page says."""
    calls = []

    def stand_in(*args, **kwargs):
        calls.append(kwargs)
        documented(*args, **kwargs)

    monkeypatch.setattr(paged_varlen, "operator", lambda: stand_in)
    return calls


@pytest.mark.parametrize("name", PLAIN)
def test_it_is_asked_for_what_the_reference_computes(name, asked):
    case = replace(CASES[name], **BLOCKS, shared=0)
    batch = make(case, torch.bfloat16)
    store_paged(batch.keys, batch.values, batch.key, batch.value, batch.index)
    read = (batch.query, batch.keys, batch.values, batch.spans)
    wanted = torch.full_like(batch.out, UNTOUCHED, dtype=torch.float32)
    attend_paged_reference(wanted, *read, **case.options(batch))
    paged_triton.attend(batch.out, *read, **case.options(batch), plan=LIBRARY)
    assert len(asked) == (0 if name == "only padding" else 1)
    assert_close("o", wanted, batch.out, 1e-2)


def test_tokens_that_see_all_are_said_to(asked):
    for case, wanted in (
        (IN_ORDER, (-1, -1)),
        (replace(IN_ORDER, window=21), (20, 0)),
        (DECODE, (-1, 0)),  # an empty run lies among the others
        (MIXED, (-1, 0)),
    ):
        batch = make(replace(case, **BLOCKS), torch.bfloat16)
        store_paged(batch.keys, batch.values, batch.key, batch.value, batch.index)
        read = (batch.query, batch.keys, batch.values, batch.spans)
        paged_triton.attend(batch.out, *read, **case.options(batch), plan=LIBRARY)
        assert asked.pop()["window_size"] == wanted


@pytest.mark.parametrize(
    ("change", "dtype", "taken"),
    [
        ({}, torch.bfloat16, True),
        ({}, torch.float16, True),
        ({}, torch.float32, False),
        ({"softcap": 1.5}, torch.bfloat16, False),
        ({"sinks": True}, torch.bfloat16, False),
        ({"width": 20}, torch.bfloat16, False),
        ({"width": 264}, torch.bfloat16, False),
        ({"value_width": 40}, torch.bfloat16, False),
        ({"block_size": 16}, torch.bfloat16, False),
    ],
    ids=str,
)
def test_it_is_taken_where_it_can_be(change, dtype, taken, asked):
    case = replace(MIXED, **{**BLOCKS, **change})
    batch = make(case, dtype)
    options = (case.softcap, batch.sinks)
    assert paged_varlen.can_attend(batch.query, batch.keys, batch.values, *options) is taken


def test_a_newer_flash_attention_takes_any_block(asked, monkeypatch):
    batch = make(MIXED, torch.bfloat16)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3")
    assert paged_varlen.can_attend(batch.query, batch.keys, batch.values, None, None)


def test_not_without_a_build_for_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    paged_varlen.operator.cache_clear()
    batch = make(replace(MIXED, **BLOCKS), torch.bfloat16)
    assert not paged_varlen.can_attend(batch.query, batch.keys, batch.values, None, None)
    paged_varlen.operator.cache_clear()


def test_this_torch_takes_the_call(monkeypatch):
    """The installed operator, on tensors without data; before 2.12 there is none to take."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    paged_varlen.operator.cache_clear()
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    batch = make(replace(MIXED, **BLOCKS), torch.bfloat16)
    if version < (2, 12):
        assert not paged_varlen.can_attend(batch.query, batch.keys, batch.values, None, None)
        return
    out, query, keys, values = (
        tensor.to("meta") for tensor in (batch.out, batch.query, batch.keys, batch.values)
    )
    ints = ("starts", "lengths", "blocks")
    spans = replace(batch.spans, **{name: getattr(batch.spans, name).to("meta") for name in ints})
    assert paged_varlen.can_attend(query, keys, values, None, None)
    paged_varlen.attend(out, query, keys, values, spans, 0.1, window=9)
    paged_varlen.operator.cache_clear()
