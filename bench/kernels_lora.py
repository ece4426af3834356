"""LoRA on a CPU: `add_lora` against two rivals, as ratios within one run.

Rivals: `loop`, an addmm for each adapter; `cat`, one masked GEMM over all active adapters' rows.
One pass is the seven linear layers of 15 SmolLM2-135M blocks, each with weights of its own so that
caches do not flatter; the best of the rounds counts, in CPU time of one thread, the forms
taken in turn. Ratios are rival / add_lora: above 1, add_lora is faster. `gflop_per_s` counts what
LoRA needs, `gb_per_s` each active adapter's weights once. Does not cover: the GPU; building the
step map (reported apart, once a step).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabatch_kernels import SiteGroup, StepMap, add_lora, build_step_map

LAYERS = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
MEAN_WIDTHS = sum(inp + out for inp, out in LAYERS) / len(LAYERS)
BLOCKS = 15
SLOTS = 64
MAX_RANK = 64
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """One batch: `batch` tokens spread evenly and interleaved, and maybe a prefill chunk."""

    adapters: int
    rank: int
    dtype: torch.dtype
    batch: int = 32
    scattered: bool = False
    prefill: int = 0

    @property
    def name(self) -> str:
        extra = " scattered" * self.scattered + f" +{self.prefill} prefill" * bool(self.prefill)
        return f"{NAMES[self.dtype]} batch {self.batch} n{self.adapters} r{self.rank}{extra}"

    def slots(self) -> list[int]:
        step = 2 if self.scattered else 1
        tokens = [step * (token % self.adapters) for token in range(self.batch)]
        return tokens + [0] * self.prefill

    @property
    def flop(self) -> float:
        """Of one site, on average."""
        return 2 * len(self.slots()) * self.rank * MEAN_WIDTHS

    @property
    def weight_bytes(self) -> float:
        """Of the active adapters at one site, on average."""
        return len(set(self.slots())) * self.rank * MEAN_WIDTHS * self.dtype.itemsize


# The rivals' copies of `a` and `b`, in rank rows [slots, MAX_RANK, ...], by site.
ROWS: dict[int, tuple[Tensor, Tensor]] = {}


def make_groups(case: Case) -> list[SiteGroup]:
    """Each of one site."""
    groups = []
    ROWS.clear()
    used = sorted(set(case.slots()))
    for inp, out in LAYERS * BLOCKS:
        group = SiteGroup.allocate(SLOTS, MAX_RANK, inp, [out], case.dtype, "cpu")
        (site,) = group.sites
        all_a = torch.zeros(SLOTS, MAX_RANK, inp, dtype=case.dtype)
        all_b = torch.zeros(SLOTS, MAX_RANK, out, dtype=case.dtype)
        ROWS[id(site)] = all_a, all_b
        for slot in used:
            a, b = torch.randn(case.rank, inp), torch.randn(out, case.rank)
            site.load(slot, a, b, 0.01)
            all_a[slot, : case.rank].copy_(a)
            all_b[slot, : case.rank].copy_(b.t())
        groups.append(group)
    return groups


def addmm_loop(y: Tensor, x: Tensor, group: SiteGroup, indices: dict[int, Tensor]) -> None:
    (site,) = group.sites
    for slot, tokens in indices.items():
        rank = site.ranks[slot]
        v = torch.mm(x.index_select(0, tokens), ROWS[id(site)][0][slot, :rank].t())
        y.index_add_(0, tokens, torch.mm(v.mul_(site.scales[slot]), site.b[slot, :rank]))


def masked_gemm(y: Tensor, x: Tensor, group: SiteGroup, rows: Tensor, mask: Tensor) -> None:
    a, b = (part.flatten(0, 1).index_select(0, rows) for part in ROWS[id(group.sites[0])])
    y.addmm_(torch.mm(x, a.t()).mul_(mask), b)


def forms(case: Case) -> dict[str, Callable[[Tensor, Tensor, SiteGroup], None]]:
    slots = case.slots()
    used = sorted(set(slots))
    step_map: StepMap = build_step_map(slots, "cpu")
    of_token = torch.tensor(slots)
    indices = {slot: (of_token == slot).nonzero().flatten() for slot in used}
    rows = (torch.tensor(used)[:, None] * MAX_RANK + torch.arange(case.rank)).flatten()
    owner = torch.tensor(used).repeat_interleave(case.rank)
    mask = torch.where(of_token[:, None] == owner, 0.01, 0.0).to(case.dtype)
    return {
        "add_lora": lambda y, x, group: add_lora(y, x, group, step_map),
        "loop": lambda y, x, group: addmm_loop(y, x, group, indices),
        "cat": lambda y, x, group: masked_gemm(y, x, group, rows, mask),
    }


def best_us(case: Case, rounds: int) -> dict[str, float]:
    """CPU microseconds a site of each form, the best of `rounds`."""
    groups = make_groups(case)
    tokens = len(case.slots())
    x = {inp: torch.randn(tokens, inp).to(case.dtype) for inp in (576, 1536)}
    y = {out: torch.randn(tokens, out).to(case.dtype) for out in (192, 576, 1536)}
    run = forms(case)
    best = dict.fromkeys(run, float("inf"))
    for _ in range(rounds + 1):  # the first warms up
        for name, form in run.items():
            start = time.thread_time()
            for group in groups:
                form(y[group.out_features], x[group.in_features], group)
            best[name] = min(best[name], time.thread_time() - start)
    return {name: seconds * 1e6 / len(groups) for name, seconds in best.items()}


def map_us(slots: Sequence[int]) -> float:
    best = float("inf")
    for _ in range(50):
        start = time.thread_time()
        build_step_map(slots, "cpu")
        best = min(best, time.thread_time() - start)
    return best * 1e6


def cases(quick: bool) -> list[Case]:
    kinds = [(n, r) for n in (1, 8, 32) for r in (8, 16)]
    found = [Case(n, r, dtype) for dtype in NAMES for n, r in kinds]
    for dtype in NAMES:
        found.append(Case(8, 16, dtype, scattered=True))
        found.append(Case(32, 16, dtype, scattered=True))
        found.append(Case(31, 16, dtype, batch=31, prefill=256))
    return found[3:4] if quick else found


def measure(quick: bool) -> dict[str, dict[str, float]]:
    """Figures by case."""
    report = {}
    for case in cases(quick):
        us = best_us(case, 2 if quick else 6)
        row = {"add_lora_us": round(us["add_lora"], 1)}
        row |= {f"{rival}_ratio": round(us[rival] / us["add_lora"], 2) for rival in us}
        del row["add_lora_ratio"]
        row["map_us"] = round(map_us(case.slots()), 1)
        row["gflop_per_s"] = round(case.flop / us["add_lora"] / 1e3, 1)
        row["gb_per_s"] = round(case.weight_bytes / us["add_lora"] / 1e3, 1)
        report[case.name] = row
        print(f"lora {case.name:38s} {row}", flush=True)
    return report
