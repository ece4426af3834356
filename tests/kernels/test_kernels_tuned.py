"""Tables of measured plans: which plan is taken, and how bench/tune.py searches and writes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from bench import tune
from lorabatch_kernels import tuned
from lorabatch_kernels.plan import AttentionPlan, attention_plan, plan_for, splits_for

LORA = (4096, 6144, 64, 16, torch.bfloat16)
HEADS = (128, 128, 16, torch.bfloat16)
FASTER = replace(plan_for(*LORA), block_k=256, num_warps=2)
BETTER = AttentionPlan(16, 128, num_warps=2, num_stages=4, programs=4)
TABLE = {
    "lora": {"4096,6144,64,16,bfloat16": asdict(FASTER)},
    "attention": {"128,128,16,bfloat16": asdict(BETTER)},
}


def forget():
    for cached in (plan_for, attention_plan, tuned._table):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    forget()
    yield tmp_path
    forget()


def test_without_a_table_the_plans_hold():
    assert plan_for(*LORA, "sm_90") == plan_for(*LORA)
    assert attention_plan(*HEADS, "sm_90") == attention_plan(*HEADS)


def test_a_table_is_for_its_sizes_and_its_generation(folder):
    (folder / "sm_90.json").write_text(json.dumps(TABLE))
    assert plan_for(*LORA, "sm_90") == FASTER
    assert plan_for(*LORA, "sm_80") == plan_for(*LORA) != FASTER
    assert plan_for(4096, 4096, *LORA[2:], "sm_90") == plan_for(4096, 4096, *LORA[2:])
    assert attention_plan(*HEADS, "sm_90") == BETTER
    assert attention_plan(128, 128, 5, torch.bfloat16, "sm_90") == BETTER
    assert attention_plan(128, 128, 17, torch.bfloat16, "sm_90").block_m == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "sm_90.json is no table of plans"),
        ('{"lora": {}}', "sm_90.json is no table of plans"),
        (
            '{"lora": {"4096,6144,64,16,bfloat16": {"block": 3}}, "attention": {}}',
            "4096,6144,64,16,bfloat16",
        ),
    ],
)
def test_what_is_no_table_is_named(folder, text, message):
    (folder / "sm_90.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        plan_for(*LORA, "sm_90")


def test_a_cpu_has_no_generation():
    assert tuned.generation(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("programs", "positions", "wanted", "splits"),
    [
        (8, 8192, 264, 32),
        (64, 8192, 264, 4),
        (512, 8192, 264, 1),
        (8, 512, 264, 2),
        (8, 16, 264, 1),
    ],
)
def test_splits_follow_from_shapes(programs, positions, wanted, splits):
    assert splits_for(programs, positions, wanted) == splits


def test_products_that_sm_90_gets_wrong_are_not_pipelined():
    prefill = (128, 128, 4096, torch.bfloat16)
    assert attention_plan(*prefill, "sm_80").num_stages == 2
    assert attention_plan(*prefill, "sm_90").num_stages == 1
    assert not attention_plan(*prefill, "sm_80").safe("sm_90")
    assert attention_plan(*HEADS, "sm_90").num_stages == 3
    asked = []
    measured = tune.timed(asked.append, lambda plan: False)
    assert measured(FASTER) == float("inf")
    assert not asked


def test_the_search_changes_one_field_after_the_other():
    asked = []

    def time_us(plan):
        asked.append(plan)
        if plan.num_stages == 4:
            return float("inf")
        return 100 + abs(plan.block_n - 128) + 10 * abs(plan.num_warps - 2)

    start = attention_plan(*HEADS)
    best = tune.improve(start, tune.ATTENTION_FIELDS, time_us)
    assert best == replace(start, block_n=128, num_warps=2)
    assert len(asked) == len(set(asked)), "a plan was measured twice"


def test_what_is_written_is_what_is_read(folder, monkeypatch):
    monkeypatch.setattr(tune, "device", lambda: "a GPU")
    tune.write({"lora": {}, "attention": TABLE["attention"]}, "sm_90")
    tune.write({"lora": TABLE["lora"], "attention": {}}, "sm_90")
    assert plan_for(*LORA, "sm_90") == FASTER
    assert attention_plan(*HEADS, "sm_90") == BETTER
    assert json.loads((folder / "sm_90.json").read_text())["measured"]["device"] == "a GPU"


def test_sizes_from_a_config(tmp_path):
    config = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = {"hidden": 64, "inner": 96, "heads": 4, "kv_heads": 4, "width": 16}
    assert tune.sizes_of(str(tmp_path)) == wanted
    with pytest.raises(SystemExit, match="no model 'gpt-9': wanted one of"):
        tune.sizes_of("gpt-9")


def test_without_a_cuda_device_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="measures on a CUDA device, and torch finds none"):
        tune.main([])
