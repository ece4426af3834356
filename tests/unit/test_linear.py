"""Products of the base model: each way to make them says the same; shared inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lorabatch_kernels import PackedWeight
from lorabatch_worker import linear
from lorabatch_worker.linear import Dense, Plain, Reordered, SharedInput, can_reorder


@pytest.fixture(params=[PackedWeight, Reordered, Plain])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[object]:
    """The class that multiplies."""
    if request.param is not PackedWeight:
        monkeypatch.setattr(PackedWeight, "can_pack", lambda weight: False)
    if request.param is Plain:
        monkeypatch.setattr(linear, "can_reorder", lambda device, dtype: False)
    made: type[object] = request.param
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 33, 300])
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_is_torchs_own(
    kind: type[object], dtype: torch.dtype, tokens: int, biased: bool
) -> None:
    torch.manual_seed(tokens)
    weight = torch.randn(70, 50).to(dtype)
    bias = torch.randn(70).to(dtype) if biased else None
    x = torch.randn(1, tokens, 50).to(dtype)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.inference_mode():
        dense = Dense(weight, bias)
        assert type(dense.product) is kind
        got = dense(x)
    torch.testing.assert_close(got, F.linear(x, weight, bias), rtol=limit, atol=10 * limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first", "count"), [(0, 1100), (3, 9), (31, 700), (1099, 1)])
def test_any_layout_gives_its_weight_back(
    kind: type[object], dtype: torch.dtype, first: int, count: int
) -> None:
    weight = torch.randn(1100, 50).to(dtype)
    dense = Dense(weight, torch.randn(1100).to(dtype))
    assert type(dense.product) is kind
    blocks = list(dense.weight_blocks(first, count))
    assert max(len(rows) for rows in blocks) <= 512
    assert torch.equal(torch.cat(blocks), weight[first : first + count])


def test_a_weight_in_another_layout_is_held_once(kind: type[object]) -> None:
    dense = Dense(torch.randn(8, 4))
    assert (dense.weight.numel(), dense.weight.dtype) == (32 * (kind is Plain), torch.float32)
    assert (dense.in_features, dense.out_features) == (4, 8)


def test_what_onednn_cannot_reorder_is_left_alone() -> None:
    assert can_reorder("cpu", torch.float32)
    assert not can_reorder("cuda", torch.bfloat16)
    assert not can_reorder("cpu", torch.float16)
    assert type(Dense(torch.randn(8, 4).half()).product) is Plain


def test_layers_that_share_their_input_are_multiplied_once(kind: type[object]) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(n, 5) for n in (4, 1, 7)]
    bias = torch.randn(1)
    shared = SharedInput(weights, [None, bias, None])
    made: list[int] = []
    for round_ in range(2):
        x = torch.randn(1, 3, 5)
        for number in (2, 0, 1):
            part = shared.part(x, number, lambda: lambda y: made.append(y.shape[-1]))
            own = bias if number == 1 else None
            torch.testing.assert_close(part, F.linear(x, weights[number], own))
        assert made == [12] * (round_ + 1)


def test_another_input_in_between_is_computed_anew() -> None:
    weights = [torch.randn(4, 5), torch.randn(2, 5)]
    shared = SharedInput(weights, [None, None])
    x, other = torch.randn(1, 3, 5), torch.randn(1, 3, 5)
    shared.part(x, 0, lambda: lambda whole: None)
    torch.testing.assert_close(
        shared.part(other, 1, lambda: lambda whole: None), F.linear(other, weights[1])
    )
