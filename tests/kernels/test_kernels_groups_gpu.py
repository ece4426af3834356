"""LoRA of several sites on a real GPU: beside the base product, inside of what reads it next, and
from CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import row_cases
import torch
from lora_cases import assert_close, group_of, group_reference

from lorabatch_kernels import build_step_map, lora, rotary_
from lorabatch_kernels.plan import plan_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
FORMS = pytest.mark.parametrize(
    ("beside", "fused"), [(False, False), (True, False), (False, True), (True, True)]
)
RANKS = [{0: 3, 1: 17, 2: 40}, {3: 16, 0: 5}, {0: 8, 3: 1}]
SLOTS = [0, 1, -1, 2, 4, 0, 1, -1, 3, 2] * 9
IN, WIDTH = 576, 64


def drawn(*shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


class Layer:
    """A base product of several sites, and what reads it."""

    def __init__(self, widths, dtype, monkeypatch, **form):
        self.group = group_of(RANKS[: len(widths)], IN, widths, dtype, "cuda")
        self.weight = drawn(sum(widths), IN, dtype=dtype, seed=1) / IN**0.5
        self.x = drawn(len(SLOTS), IN, dtype=dtype, seed=2)
        angle = drawn(len(SLOTS), WIDTH, dtype=torch.float32, seed=3)
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)
        self.residual = drawn(len(SLOTS), widths[0], dtype=dtype, seed=4)
        self.map = build_step_map(SLOTS, "cuda")
        from lorabatch_kernels import lora_triton

        made = replace(plan_for(IN, sum(widths), 40, 16, dtype), **form)
        monkeypatch.setattr(lora_triton, "plan_for", lambda *sizes: made)

    def run(self, what):
        terms = lora.LoraTerms(self.x, self.group, self.map)
        y = self.x @ self.weight.t()
        if what == "gate":
            return terms.gate(y)
        if what == "rotate":
            terms.rotate(y, self.cos, self.sin)
        elif what == "sum":
            total = self.residual.clone()
            terms.sum(total, y)
            return total
        else:
            terms.add_to(y)
        return y

    def reference(self, what):
        y = self.x.float() @ self.weight.float().t()
        total = group_reference(y, self.x, self.group, SLOTS)
        if what == "gate":
            return row_cases.gated(total)
        if what == "rotate":
            turned = sum(site.out_features for site in self.group.sites[:2])
            rotary_(total[:, :turned], self.cos.float(), self.sin.float())
        return self.residual.float() + total if what == "sum" else total


LAYERS = {
    "add_to": [50, 9, 33],
    "gate": [1536, 1536],
    "rotate": [9 * WIDTH, 3 * WIDTH, 3 * WIDTH],
    "sum": [576],
}


@FORMS
@DTYPES
@pytest.mark.parametrize("what", LAYERS)
def test_against_the_reference(what, dtype, beside, fused, monkeypatch):
    layer = Layer(LAYERS[what], dtype, monkeypatch, beside=beside, fused=fused)
    for _ in range(3):  # what one call gives back, the next one's other stream takes
        assert_close(what, layer.reference(what), layer.run(what).float(), TOLERANCE[dtype])


@FORMS
@pytest.mark.parametrize("what", LAYERS)
def test_from_a_graph(what, beside, fused, monkeypatch):
    layer = Layer(LAYERS[what], torch.bfloat16, monkeypatch, beside=beside, fused=fused)
    wanted = layer.run(what).clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.run(what)
    for _ in range(2):
        out.fill_(7.0)
        graph.replay()
        assert torch.equal(out, wanted)
