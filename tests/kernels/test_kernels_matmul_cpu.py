"""Products over packed weights against torch's own, row by row the same whatever is beside them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lora_cases import assert_close

from lorabatch_kernels import PackedWeight, native

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3}


def fresh(*shape, dtype, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("out", [32, 96, 70, 5])
@pytest.mark.parametrize("tokens", [1, 11, 12, 13, 25, 191, 193, 500])
def test_a_product_is_torchs(dtype, biased, out, tokens):
    weight, x = fresh(out, 50, dtype=dtype), fresh(1, tokens, 50, dtype=dtype, seed=6)
    bias = fresh(out, dtype=dtype, seed=7) if biased else None
    got = PackedWeight(weight, bias)(x)
    assert (got.shape, got.dtype) == ((1, tokens, out), dtype)
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_close("product", wanted, got.double(), TOLERANCE[dtype])


@DTYPES
def test_a_row_does_not_depend_on_the_others(dtype):
    weight, x = fresh(70, 576, dtype=dtype), fresh(200, 576, dtype=dtype, seed=6)
    product = PackedWeight(weight, None)
    together = product(x)
    for first, last in [(0, 1), (3, 15), (199, 200), (50, 150)]:
        assert torch.equal(product(x[first:last]), together[first:last])


@DTYPES
def test_what_is_not_finite_stays_in_its_row(dtype):
    weight, x = fresh(40, 64, dtype=dtype), fresh(30, 64, dtype=dtype, seed=6)
    clean = PackedWeight(weight, None)(x)
    x[7, 3], x[20, 0] = float("nan"), float("inf")
    got = PackedWeight(weight, None)(x)
    others = [row for row in range(30) if row not in (7, 20)]
    assert torch.equal(got[others], clean[others])
    assert got[7].isnan().all()
    assert not got[20].isfinite().any()


def test_rows_that_are_not_contiguous_are_read_as_they_are():
    weight, x = fresh(40, 64, dtype=torch.float32), fresh(64, 9, dtype=torch.float32).t()
    torch.testing.assert_close(PackedWeight(weight, None)(x), F.linear(x, weight))


def test_an_x_of_another_type_is_refused():
    product = PackedWeight(fresh(40, 64, dtype=torch.bfloat16), None)
    with pytest.raises(ValueError, match=r"x is torch.float32, wanted .* torch.bfloat16"):
        product(fresh(3, 64, dtype=torch.float32))


def test_what_there_is_no_kernel_for_is_not_packed(monkeypatch):
    assert PackedWeight.can_pack(fresh(4, 3, dtype=torch.float32))
    assert PackedWeight.can_pack(fresh(4, 6, dtype=torch.bfloat16)) != native.has("amx_bf16")
    assert not PackedWeight.can_pack(fresh(4, 3, dtype=torch.bfloat16))
    assert not PackedWeight.can_pack(fresh(4, 4, dtype=torch.float16))
    monkeypatch.setattr(native, "library", lambda: None)
    assert not PackedWeight.can_pack(fresh(4, 3, dtype=torch.float32))
