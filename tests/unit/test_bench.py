"""Benchmarks ask for settings that exist, at every batch of their matrix."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.adapters import request_count, room
from bench.workload import Request
from lorabatch import Settings


@pytest.mark.parametrize(("batch", "requests"), [(1, 16), (8, 16), (32, 64), (64, 128), (256, 256)])
def test_the_matrix_of_adapters_by_batch_fits(tmp_path: Path, batch: int, requests: int) -> None:
    assert request_count(batch) == requests
    longest = 203
    asked = room([Request((1,) * 5, None), Request((1,) * longest, None)], batch, 32)
    settings = Settings.load(home=tmp_path, **asked)
    assert settings.max_seqs == batch
    assert settings.max_context_tokens >= longest + 32
    assert settings.kv_cache_tokens == batch * settings.max_context_tokens
