"""The package's face: `__all__`, no triton on a CPU, mistakes named, dispatch by device."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from lora_cases import Shape, alone

import lorabatch_kernels
from lorabatch_kernels import SiteGroup, add_lora, build_step_map

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import lorabatch_kernels as k
group = k.SiteGroup.allocate(1, 4, 6, [5], torch.float32, "cpu")
group.sites[0].load(0, torch.ones(2, 6), torch.ones(5, 2), 0.5)
y = torch.zeros(3, 5)
k.add_lora(y, torch.ones(3, 6), group, k.build_step_map([0, -1, 0], "cpu"))
assert y.tolist() == [[6.0] * 5, [0.0] * 5, [6.0] * 5], y
assert not any(name.startswith("triton") for name in sys.modules if sys.modules[name])
"""


def test_all_is_what_the_package_imports():
    tree = ast.parse(Path(lorabatch_kernels.__file__).read_text())
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(lorabatch_kernels.__all__) == imported
    assert lorabatch_kernels.__all__ == sorted(lorabatch_kernels.__all__)
    for name in lorabatch_kernels.__all__:
        assert getattr(lorabatch_kernels, name) is not None


def test_a_cpu_process_needs_no_triton():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_layout_of_the_sites_decides(monkeypatch):
    calls = []
    monkeypatch.setattr(lorabatch_kernels.lora, "add_lora_cpu", lambda *args: calls.append("cpu"))
    fake = type(sys)("lorabatch_kernels.lora_triton")
    fake.Shrinking = Mock(return_value=Mock(add_to=lambda y: calls.append("triton")))
    monkeypatch.setitem(sys.modules, "lorabatch_kernels.lora_triton", fake)
    shape = Shape([0, -1], {0: 4})
    x, y = shape.x_y(torch.float32)
    step_map = build_step_map(shape.slots, "cpu")
    for paneled in (True, False):
        group = alone(shape.site(torch.float32, paneled=paneled))
        add_lora(y, x, group, step_map)
        add_lora(y, x, group, build_step_map([-1, -1], "cpu"))
    assert calls == ["cpu", "triton"]


@pytest.mark.parametrize(
    ("x", "y", "slots", "message"),
    [
        ((3, 70), (2, 50), [0, 1], r"x is \[3, 70\], wanted \[2, 70\]"),
        ((2, 71), (2, 50), [0, 1], r"x is \[2, 71\], wanted \[2, 70\]"),
        ((2, 70), (2, 51), [0, 1], r"y is \[2, 51\], wanted \[2, 50\]"),
        ((2, 70), (2, 50), [0, 9], r"slot is 9, wanted below 3"),
    ],
)
def test_shapes_that_do_not_fit_are_named(x, y, slots, message):
    group = alone(Shape([], {0: 4, 1: 4}).site(torch.float32))
    with pytest.raises(ValueError, match=message):
        add_lora(torch.zeros(y), torch.zeros(x), group, build_step_map(slots, "cpu"))


def test_dtypes_strides_and_devices_that_do_not_fit_are_named():
    shape = Shape([0, 1], {0: 4, 1: 4})
    group, step_map = alone(shape.site(torch.float32)), build_step_map([0, 1], "cpu")
    x, y = shape.x_y(torch.float32)
    with pytest.raises(ValueError, match=r"y is torch.bfloat16 on cpu, wanted that of x"):
        add_lora(y.bfloat16(), x, group, step_map)
    with pytest.raises(ValueError, match=r"y is torch.float32 on meta, wanted that of x"):
        add_lora(y.to("meta"), x, group, step_map)
    with pytest.raises(ValueError, match=r"the sites are torch.bfloat16"):
        add_lora(y, x, alone(shape.site(torch.bfloat16)), step_map)
    with pytest.raises(ValueError, match=r"the column stride of x is 2, wanted 1"):
        add_lora(y, x.t().contiguous().t(), group, step_map)
    with pytest.raises(ValueError, match=r"the column stride of y is 2, wanted 1"):
        add_lora(y.t().contiguous().t(), x, group, step_map)
    with pytest.raises(ValueError, match=r"x is on meta, the sites on cpu"):
        add_lora(y, x.to("meta"), group, step_map)


def test_a_group_on_a_gpu_has_at_most_three_sites():
    sizes = (1, 4, 6, [5] * 4, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"4 sites share an input, wanted 3 or fewer"):
        SiteGroup.allocate(*sizes, paneled=False)
    assert len(SiteGroup.allocate(*sizes).sites) == 4
