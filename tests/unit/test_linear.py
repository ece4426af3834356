"""Products of the base model: packed and plain say the same, and layers that share an input do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lorabatch_worker import linear
from lorabatch_worker.linear import Dense, SharedInput, can_pack


@pytest.fixture(params=["packed", "plain"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(linear, "can_pack", lambda device, dtype: False)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 33, 300])
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_is_torchs_own(kind: str, dtype: torch.dtype, tokens: int, biased: bool) -> None:
    torch.manual_seed(tokens)
    weight = torch.randn(70, 50).to(dtype)
    bias = torch.randn(70).to(dtype) if biased else None
    x = torch.randn(1, tokens, 50).to(dtype)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.inference_mode():
        got = Dense(weight, bias)(x)
    torch.testing.assert_close(got, F.linear(x, weight, bias), rtol=limit, atol=10 * limit)


def test_a_packed_weight_is_held_once() -> None:
    assert can_pack("cpu", torch.float32)
    dense = Dense(torch.randn(8, 4))
    assert (dense.weight.numel(), dense.weight.dtype) == (0, torch.float32)
    assert (dense.in_features, dense.out_features) == (4, 8)


def test_what_cannot_be_packed_is_left_alone() -> None:
    assert not can_pack("cuda", torch.bfloat16)
    assert not can_pack("cpu", torch.float16)


def test_layers_that_share_their_input_are_multiplied_once(kind: str) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(n, 5) for n in (4, 1, 7)]
    bias = torch.randn(1)
    shared = SharedInput(weights, [None, bias, None])
    made: list[int] = []
    for round_ in range(2):
        x = torch.randn(1, 3, 5)
        for number in (2, 0, 1):
            part = shared.part(x, number, lambda whole: made.append(whole.shape[-1]))
            own = bias if number == 1 else None
            torch.testing.assert_close(part, F.linear(x, weights[number], own))
        assert made == [12] * (round_ + 1)


def test_another_input_in_between_is_computed_anew() -> None:
    weights = [torch.randn(4, 5), torch.randn(2, 5)]
    shared = SharedInput(weights, [None, None])
    x, other = torch.randn(1, 3, 5), torch.randn(1, 3, 5)
    shared.part(x, 0, lambda whole: None)
    torch.testing.assert_close(
        shared.part(other, 1, lambda whole: None), F.linear(other, weights[1])
    )
