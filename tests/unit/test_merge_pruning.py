"""Which values of an adapter a merge keeps: as many as asked for, and always the same."""

from __future__ import annotations

import pytest
import torch

from lorabatch.job import MergedAdapters
from lorabatch_kernels import LoraWeights
from lorabatch_worker.adapters.merge import kept_at_random, kept_largest, merge
from lorabatch_worker.adapters.weights import Adapter

IDS = ("one", "two")


def test_the_draws_are_fixed() -> None:
    """On every machine and with every torch: kept where a word of SHAKE-256 is below 0."""
    kept = kept_at_random(torch.ones(3, 4), 0.5, "a label")
    assert kept.int().flatten().tolist() == [1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
def test_dare_keeps_that_share_and_the_mean(density: float) -> None:
    rows = torch.ones(8, 20_000)
    kept = kept_at_random(rows, density, "x")
    assert kept.float().mean().item() == pytest.approx(density, abs=0.01)
    made = [
        Adapter(name, name, {"layer": LoraWeights.pack(rows, rows.t(), 0.25)}, None) for name in IDS
    ]
    spec = MergedAdapters(ids=IDS, weights=(1, 4), merge_strategy="dare_linear", density=density)
    site = merge("m", made, spec).sites["layer"]
    for part in (site.a, site.b):
        values = part.unique()
        wanted = torch.tensor([0, 0.5, 1, 1.5]) / density
        torch.testing.assert_close(values, wanted)
        assert part.mean().item() == pytest.approx(1.5, rel=0.03)


def test_of_equal_values_the_first_are_kept() -> None:
    values = torch.tensor([[3.0, -1, 1, 0], [1, -4, -1, 1]])
    for density, count in ((0.1, 0), (0.25, 2), (0.5, 4), (0.7, 5), (0.99, 7)):
        kept = kept_largest(values, density)
        order = [5, 0, 1, 2, 4, 6, 7, 3]
        assert kept.flatten().nonzero().flatten().tolist() == sorted(order[:count])
