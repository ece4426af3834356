"""The goals of the work on speed, held against the newest figures: bench/results/goals.json.

    python -m bench.goals

Reads what the benchmarks appended to bench/results/. A goal is met, not met, or not measured yet;
each names the command that measures it and the line's conditions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.record import RESULTS
from bench.rows import Row, read_rows

CONDITIONS = ("date", "device", "versions", "threads", "repeats", "load1_at_end")


@dataclass(frozen=True)
class Goal:
    """`value` reads a line of `question` for which `fits` holds."""

    name: str
    target: float
    question: str
    command: str
    fits: Callable[[Row], bool]
    value: Callable[[Row], float | None]


def has(**wanted: Any) -> Callable[[Row], bool]:
    return lambda row: all(row.get(name) == value for name, value in wanted.items())


def alike(**wanted: Any) -> Callable[[Row], bool]:
    """As `has`, of lines whose engines all computed every token of every prompt."""
    return has(prefix_cache=False, **wanted)


def beside(peer: str) -> Callable[[Row], float | None]:
    return lambda row: row.get("times_faster_than", {}).get(peer)


def beside_base_of_vllm(row: Row) -> float | None:
    """Our 32 adapters against vLLM without any: two lines of the same run of the command."""
    theirs = [
        other["tokens_per_s"].get("vllm")
        for other in read_rows("throughput")
        if other["adapters"] == 0
        and other["dtype"] == row["dtype"]
        and "run" in other
        and other["run"] == row.get("run")
    ]
    ours = row["tokens_per_s"]["lorabatch"]
    return round(ours / theirs[-1], 3) if theirs and theirs[-1] else None


THROUGHPUT = (
    "python -m bench.throughput --adapters 32 0 --peers peft vllm --vllm PYTHON --repeats 5"
)
GOALS = [
    Goal(
        "CPU fp32, 32 adapters, against vLLM with the same 32",
        5.5,
        "throughput",
        THROUGHPUT,
        alike(adapters=32, dtype="float32"),
        beside("vllm"),
    ),
    Goal(
        "CPU bf16, 32 adapters, against vLLM with the same 32",
        7.0,
        "throughput",
        f"{THROUGHPUT} --dtype bfloat16",
        alike(adapters=32, dtype="bfloat16"),
        beside("vllm"),
    ),
    *(
        Goal(
            f"CPU {short}, 32 adapters, against transformers + PEFT mixed batches",
            3.0,
            "throughput",
            f"{THROUGHPUT} --dtype {dtype}",
            alike(adapters=32, dtype=dtype),
            beside("peft"),
        )
        for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
    ),
    *(
        Goal(
            f"CPU {short}, 32 adapters, against vLLM without adapters",
            1.0,
            "throughput",
            f"{THROUGHPUT} --dtype {dtype}",
            alike(adapters=32, dtype=dtype),
            beside_base_of_vllm,
        )
        for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
    ),
    *(
        Goal(
            f"CPU {short}, base only, against vLLM base only",
            1.15,
            "throughput",
            f"{THROUGHPUT} --dtype {dtype}",
            alike(adapters=0, dtype=dtype),
            beside("vllm"),
        )
        for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
    ),
    *(
        Goal(
            f"CPU {short}, the workload with {count} adapters: GEMM time / wall",
            0.75,
            "breakdown",
            f"python -m bench.breakdown --dtype {dtype}",
            has(adapters=count, dtype=dtype),
            lambda row: row["gemm_to_wall"],
        )
        for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
        for count in (0, 32)
    ),
    *(
        Goal(
            f"CPU {short}, 32 adapters of our own base, batch {batch}",
            0.90,
            "adapters",
            f"python -m bench.adapters --dtype {dtype}",
            has(batch=batch, dtype=dtype),
            lambda row: row["of_base"].get("32"),
        )
        for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
        for batch in (32, 64)
    ),
    Goal(
        "CPU bf16, decode step of the base at batch 32: GEMM floor / step",
        0.70,
        "breakdown",
        "python -m bench.breakdown --dtype bfloat16 --adapters 0",
        has(adapters=0, dtype="bfloat16", max_seqs=32),
        lambda row: row["gemm_to_step"],
    ),
    Goal(
        "shared 512-token prefix, 256 jobs: cached against not",
        3.0,
        "prefix",
        "python -m bench.prefix",
        has(jobs=256, prefix_tokens=512),
        lambda row: row["times_faster"],
    ),
    Goal(
        "end to end against the engine alone, 1,000 short jobs",
        0.97,
        "end_to_end",
        "python -m bench.end_to_end",
        has(engine="real", jobs=1000),
        lambda row: row["engine_to_service"],
    ),
]
GPU = {
    "H200, Llama-3-8B dims, bf16: 32 adapters r16 against base, decode batch 64": 0.95,
    "H200: decode step at batch 1 and 64 against the memory floor": 0.75,
    "H200: LoRA increment against vLLM's and SGLang's Triton operators (at most)": 0.8,
    "H200: tokens per second against transformers + PEFT mixed batches": 5.0,
}


def judge(goal: Goal) -> dict[str, Any]:
    fitting = [row for row in read_rows(goal.question) if goal.fits(row)]
    values = [(row, value) for row in fitting if (value := goal.value(row)) is not None]
    answer: dict[str, Any] = {"name": goal.name, "target": goal.target, "command": goal.command}
    if not values:
        return {**answer, "value": None, "met": None, "why": "not measured yet"}
    row, value = values[-1]
    conditions = {name: row[name] for name in CONDITIONS if name in row}
    return {**answer, "value": value, "met": value >= goal.target, "conditions": conditions}


def main() -> None:
    found = [judge(goal) for goal in GOALS]
    why = "no GPU could be had; see bench/PENDING_GPU.md"
    found += [
        {"name": name, "target": target, "value": None, "met": None, "why": why}
        for name, target in GPU.items()
    ]
    (RESULTS / "goals.json").write_text(json.dumps(found, indent=1) + "\n")
    for goal in found:
        said = {True: "met", False: "not met", None: "not measured"}[goal["met"]]
        print(f"{goal['value'] or '-':>8} of {goal['target']:<5} {said:13} {goal['name']}")


if __name__ == "__main__":
    main()
