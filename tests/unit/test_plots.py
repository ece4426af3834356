"""Pictures are drawn from what benchmarks record; rows that cannot be read are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.plots import draw, main, rows_of
from bench.rows import RowError

CPU = "2 x Test CPU (avx2)"
SECONDS = {"service": [2.0, 2.5, 2.1], "engine": [1.9, 2.0, 2.0]}
ROWS: dict[str, dict[str, Any]] = {
    "throughput": {
        "adapters": 32,
        "max_seqs": 32,
        "output_tokens": 2048,
        "tokens_per_s": {"lorabatch": 100.0, "peft": 30.0},
    },
    "adapters": {
        "batch": 32,
        "new_tokens": 32,
        "of_base": {"32": 0.9},
        "tokens_per_s": {"0": 100.0, "32": 90.0},
    },
    "breakdown": {
        "adapters": 32,
        "max_seqs": 32,
        "seconds": {"gemm": 2.0, "lora": 0.3, "new part": 0.1},
        "decode_step_ms": {"gemm": 20.0, "lora": 3.0},
        "gemm_to_wall": 0.7,
        "gemm_to_step": None,
    },
    "context": {
        "adapters": 8,
        "batch": 8,
        "by_context": {"128": {"prefill_us_a_token": 400.0, "decode_us_a_token": 1500.0}},
    },
    "many": {
        "slots": 32,
        "host_bytes": 1 << 30,
        "of_few": {"8 equal": 1.0, "8 zipf": 1.0, "1000 zipf": 0.9, "1000 even": 0.8},
    },
    "soak": {
        "database": "sqlite",
        "minutes": 1.0,
        "jobs": 600,
        "faults": {"SIGTERM": 2},
        "lost": 0,
        "duplicated": 0,
        "survivor": {"warm_minutes": 0.2, "rss_mb_grown": 0.5},
        "series": {
            "minutes": [0.5, 1.0],
            "rss_mb": [90.0, 91.0],
            "fds": [20, 21],
            "threads": [10, 10],
            "broker_mb": [2.0, 2.1],
            "open_jobs": [3, 4],
        },
    },
    "end_to_end": {"engine": "real", "jobs": 9, "engine_to_service": 0.9, "seconds": SECONDS},
}


def write(folder: Path, question: str, **fields: Any) -> None:
    row = {"question": question, "date": "2026-01-02T03:04:05+00:00", "device": CPU}
    row |= {"dtype": "float32", "threads": 2, "repeats": 3, **ROWS[question], **fields}
    with (folder / f"{question}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_every_question_with_rows_gets_a_picture_that_tells_its_conditions(tmp_path: Path) -> None:
    for question in ROWS:
        write(tmp_path, question)
        write(tmp_path, question, dtype="bfloat16")
    write(tmp_path, "throughput", device="Test GPU, 2 x Test CPU (avx2)")
    made = draw(tmp_path)
    assert [path.name for path in made] == [
        "throughput-2-x-test-cpu.svg",
        "throughput-test-gpu-2-x-test-cpu.svg",
        "adapters-2-x-test-cpu.svg",
        "breakdown-2-x-test-cpu.svg",
        "context-2-x-test-cpu.svg",
        "service-2-x-test-cpu.svg",
        "many-2-x-test-cpu.svg",
        "soak-2-x-test-cpu.svg",
    ]
    for path in made:
        drawn = path.read_text()
        assert "2 x Test CPU (avx2); 2 threads; medians of 3 runs; 2026-01-02 03:04 UTC" in drawn
    assert draw(tmp_path)[0].read_text() == made[0].read_text()


def test_later_figures_replace_earlier_ones_of_the_same_conditions(tmp_path: Path) -> None:
    write(tmp_path, "throughput")
    write(tmp_path, "throughput", adapters=0, tokens_per_s={"lorabatch": 120.0})
    write(tmp_path, "throughput", tokens_per_s={"lorabatch": 110.0, "vllm": 20.0})
    found = [(row["adapters"], row["tokens_per_s"]) for row in rows_of("throughput", tmp_path)]
    assert found == [
        (32, {"peft": 30.0}),
        (0, {"lorabatch": 120.0}),
        (32, {"lorabatch": 110.0, "vllm": 20.0}),
    ]
    write(tmp_path, "breakdown")
    write(tmp_path, "breakdown", gemm_to_wall=0.8)
    write(tmp_path, "breakdown", max_seqs=64)
    found = [(row["max_seqs"], row["gemm_to_wall"]) for row in rows_of("breakdown", tmp_path)]
    assert found == [(32, 0.8), (64, 0.7)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON: Expecting property name"),
        ("[1]", "line 2: '[1]' is no object"),
        ("{}", "line 2: no field 'tokens_per_s'; measure again, or remove the line"),
        ('{"tokens_per_s": 3}', "line 2: tokens_per_s is 3, and an object is wanted"),
        ('{"tokens_per_s": {"peft": "x"}}', "tokens_per_s.peft is 'x', and a number is wanted"),
        ('{"tokens_per_s": {"peft": NaN}}', "tokens_per_s.peft is nan, and a number is wanted"),
        (
            '{"tokens_per_s": {"peft": 1}, "adapters": 1, "device": "x", "date": "soon"}',
            "'soon' is no ISO date",
        ),
    ],
)
def test_rows_that_cannot_be_read_are_refused(tmp_path: Path, line: str, message: str) -> None:
    write(tmp_path, "throughput")
    with (tmp_path / "throughput.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RowError) as caught:
        draw(tmp_path)
    assert str(tmp_path / "throughput.jsonl") in str(caught.value)
    assert message in str(caught.value)


def test_no_rows_at_all_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["plots", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="run a benchmark first"):
        main()
