"""Decode steps over fixed tensors: the same tokens as steps that are laid out anew each time.

Here "recorded" means called again on the same tensors; on a GPU the same tests run on real graphs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorabatch import Job
from lorabatch_worker import attention, build
from lorabatch_worker import graphs as graphs_module
from lorabatch_worker.graphs import CudaCapture, bucket_sizes
from lorabatch_worker.model_runner import ModelRunner
from tests.desk import Desk, engine_for
from tests.models import as_base, generate, tiny_config, tiny_model

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
        ],
    ),
]
SLOTS = 3


class Recorder:
    """Counts what is recorded; `real`: into CUDA graphs."""

    def __init__(self, device: str = "cpu") -> None:
        self.recorded = 0
        self._capture = CudaCapture() if device == "cuda" else None

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        if self._capture is None:
            return call
        return self._capture(call)


def broken(call: Callable[[], None]) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing\nsecond line")


def runner_on(model: Any, device: str, capture: Any, max_seqs: int = 12) -> ModelRunner:
    torch.set_num_threads(1)
    base = replace(as_base(model.to(device)), device=torch.device(device))
    return ModelRunner(base, 2048, 8, SLOTS, 8, max_seqs, rows=False, capture=capture)


def load_adapters(runner: ModelRunner, seed: int = 0) -> None:
    """Of other ranks in each slot."""
    generator = torch.Generator().manual_seed(seed)
    for site in runner.sites.values():
        for slot in range(SLOTS):
            a = torch.randn(slot + 1, site.in_features, generator=generator) / 8
            b = torch.randn(site.out_features, slot + 1, generator=generator) / 4
            both = torch.randn(2, site.out_features, generator=generator) / 4
            affine = (both[0], both[1]) if slot == seed % SLOTS else None
            site.load(slot, a, b, 1.0, affine=affine)


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    sizes = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [torch.randint(3, 250, (n,), generator=generator).tolist() for n in sizes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_logits_are_those_of_steps_that_are_not_recorded(kind: str, device: str) -> None:
    model = tiny_model(tiny_config(kind, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    recorder = Recorder(device)
    plain = runner_on(copy.deepcopy(model), device, broken)
    fixed = runner_on(model, device, recorder)
    assert fixed.graphs is not None
    fixed.warm_up(lambda: None)
    assert recorder.recorded == len(fixed.graphs) == 2 * len(bucket_sizes(12))
    for seed, count in enumerate((12, 1, 5, 8, 9, 2)):
        for runner in (plain, fixed):
            load_adapters(runner, seed)
        slots = [(i + seed) % (SLOTS + 1) - 1 for i in range(count)]
        for used in (slots, [-1] * count):
            before = fixed.graphs.replays
            wanted, found = (generate(r, prompts(count), used, 6, 99) for r in (plain, fixed))
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
            assert fixed.graphs.replays == before + 5, "all steps but the prompts'"
    assert recorded_once(recorder, fixed)


def recorded_once(recorder: Recorder, runner: ModelRunner) -> bool:
    return runner.graphs is not None and recorder.recorded == len(runner.graphs)


def test_a_prompt_of_one_token_and_batches_too_large_need_no_graph_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs_module, "MAX_SEQS", 4)
    runner = runner_on(tiny_model(tiny_config("llama")), "cpu", Recorder())
    runner.warm_up(lambda: None)
    assert runner.graphs is not None
    assert len(runner.graphs) == 2 * len([1, 2, 4])
    generate(runner, [[5], [6, 7]], [-1, 0], 3, 1)
    assert runner.graphs.replays == 3, "all but the first, in which one of the two does not sample"
    generate(runner, prompts(5), [-1] * 5, 3, 99)
    assert runner.graphs.replays == 3


def test_a_model_that_cannot_be_recorded_runs_without_graphs() -> None:
    model = tiny_model(tiny_config("llama"))
    wanted = generate(runner_on(copy.deepcopy(model), "cpu", None), prompts(3), [-1] * 3, 4, 99)
    runner = runner_on(model, "cpu", broken)
    with capture_logs() as logs:
        runner.warm_up(lambda: None)
    assert [(e["log_level"], e["error"]) for e in logs] == [
        ("warning", "RuntimeError: operation not permitted when stream is capturing")
    ]
    assert runner.graphs is not None
    assert len(runner.graphs) == 0
    torch.testing.assert_close(generate(runner, prompts(3), [-1] * 3, 4, 99), wanted)


def test_rows_of_a_cpu_have_no_graphs() -> None:
    base = as_base(tiny_model(tiny_config("llama")))
    assert ModelRunner(base, 512, 8, 1, 4, capture=Recorder()).graphs is None


# -- nothing in a step depends on numbers that only the device has ------------


class NoQuestions(TorchDispatchMode):
    """Notes operators that on a GPU would have the host wait for numbers, or copy a list there."""

    ASKS = ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2")
    ASKS += ("equal", "resolve_conj")  # the second: tolist

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        listed = name == "lift_fresh" and args[0].dim() > 0
        masked = name.startswith("index") and any(
            x.dtype == torch.bool for x in args[1] if isinstance(x, Tensor)
        )
        if name in self.ASKS or listed or masked:
            self.asked.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: 2 in x,
        lambda x: x[x > 1],
        lambda x: bool((x > 1).any()),
        lambda x: torch.tensor([1, 2]),
    ],
)
def test_questions_are_noticed(ask: Callable[[Tensor], Any]) -> None:
    ones = torch.ones(3)
    with torch.inference_mode(), NoQuestions() as questions:
        ask(ones)
    assert questions.asked


@pytest.mark.parametrize(
    "kind",
    """cohere gemma gemma2 gemma3_text glm4 gpt2 gpt_neox granite llama mistral olmo2 opt phi phi3
    qwen2 qwen3 stablelm starcoder2""".split(),
)
def test_models_ask_the_device_for_no_numbers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    runner = runner_on(tiny_model(tiny_config(kind, **fields)), "cpu", Recorder())
    runner.warm_up(lambda: None)

    def attend(out: Tensor, *args: Any) -> None:
        out.fill_(0.5)

    # What these two ask on a CPU is not asked by their kernels for a GPU.
    monkeypatch.setattr(attention, "store_paged", lambda *args: None)
    monkeypatch.setattr(attention, "attend_paged", attend)
    # Some of transformers' checks look at the token ids, but not while a graph is recorded.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert runner.graphs is not None
    graph = runner.graphs._graphs[8, False]
    with torch.inference_mode(), NoQuestions() as questions:
        graph.replay()
    assert questions.asked == []


# -- a whole engine on them ----------------------------------------------------

Start = Callable[..., Desk]


@pytest.fixture
def start(
    tiny_folder: Path,
    tiny_adapters: dict[str, Path],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Start]:
    desks = []

    def make(recorded: bool, **fields: Any) -> Desk:
        adapters = ",".join(f"{name}={path}" for name, path in tiny_adapters.items())
        runner: Any = ModelRunner
        if fields.get("device") == "cuda":
            runner = partial(ModelRunner, capture=None if recorded else broken)
        elif recorded:
            runner = partial(ModelRunner, rows=False, capture=Recorder())
        monkeypatch.setattr(build, "ModelRunner", runner)
        desks.append(Desk(engine_for(tiny_folder, home, adapters=adapters, **fields)))
        return desks[-1]

    yield make
    for desk in desks:
        desk.engine.drain(0)


def jobs(names: list[str | None], new: int) -> list[Job]:
    """Greedy and sampled, of different lengths, so that the batch shrinks bit by bit."""
    return [
        Job(
            job_id=f"{name}-{n}",
            adapter_id=name,
            prompt="Once upon a time there was a river. " * (1 + n % 3),
            sampling_params={
                "max_new_tokens": new + 3 * n,
                "ignore_eos": True,
                "temperature": float(n % 2),
                "repetition_penalty": 1.0 + 0.2 * (n == 3),
                "seed": n,
            },
        )
        for name in names
        for n in range(4)
    ]


ENDS = {"embedding", "tokens", "whole-head"}  # whose steps are not repeated


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_seqs": 5, "adapter_slots": 1},
        {"max_context_tokens": 128, "kv_cache_tokens": 200, "block_size": 5},
    ],
)
def test_an_engine_makes_the_same_tokens(
    start: Start, tiny_adapters: dict[str, Path], fields: dict[str, Any], device: str
) -> None:
    asked = jobs([None, *sorted(set(tiny_adapters) - ENDS)], new=20)
    wanted = start(False, device=device).run(*asked)
    desk = start(True, device=device, **fields)
    found = desk.run(*asked)
    assert {i: r.token_ids for i, r in found.items()} == {i: r.token_ids for i, r in wanted.items()}
    engine = desk.engine
    graphs = engine.runner.graphs
    assert graphs is not None
    assert graphs.replays > engine.counters.steps / 2
    assert (engine.scheduler.preemptions > 0) == ("kv_cache_tokens" in fields)
    assert engine.scheduler.blocks.free == engine.scheduler.blocks.capacity


def test_steps_with_other_ends_are_not_repeated(start: Start) -> None:
    asked = jobs(sorted(ENDS), new=4)
    wanted = start(False, device="cpu").run(*asked)
    desk = start(True, device="cpu")
    found = desk.run(*asked)
    assert {i: r.token_ids for i, r in found.items()} == {i: r.token_ids for i, r in wanted.items()}
    assert desk.engine.runner.graphs is not None
    assert desk.engine.runner.graphs.replays == 0
    desk.run(*jobs(["one-layer"], new=4))
    assert desk.engine.runner.graphs.replays > 0
