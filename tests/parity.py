"""Parity with transformers + PEFT: the same tokens, one job at a time there, mixed here.

    python -m tests.parity [--prompts 32] [--new 24] [--threads 0] [--adapters NAME ...]

fp32, greedy, end token ignored. Prints one JSON line and appends it to bench/results: jobs,
tokens, mismatches and how many of them a logit gap below 1e-4 explains. Adapters: the shipped
ones, and random ones that PEFT itself writes (rank_pattern, alpha_pattern, rsLoRA, all linear
layers, a subset of layers).
"""

from __future__ import annotations

import argparse
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.record import record
from lorabatch import Job, Result, Settings
from lorabatch.ledger import Claim, Outcome

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "examples" / "adapters"
BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
EXPLAINED_GAP = 1e-4

RANDOM: dict[str, dict[str, Any]] = {
    "all-linear-r16": {"r": 16, "lora_alpha": 32, "target_modules": ATTENTION + MLP},
    "rslora-r8": {"r": 8, "lora_alpha": 8, "target_modules": ATTENTION, "use_rslora": True},
    "rank-pattern": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": [*ATTENTION, "down_proj"],
        "rank_pattern": {"q_proj": 12, "layers.3.mlp.down_proj": 1, r"layers\.2\d.*v_proj": 7},
        "alpha_pattern": {"v_proj": 3, r"layers\.1\..*": 20},
    },
    "some-layers-r5": {
        "r": 5,
        "lora_alpha": 10,
        "target_modules": ["v_proj", "up_proj"],
        "layers_to_transform": [0, 7, 29],
    },
}
SUBJECTS = (
    "the moon tea bridges honey chess winter maps glass salt clocks rivers violins trains paper "
    "gravity bread"
).split()
ASKS = ("Tell me one fact about {}.", "How many {} are there?")


def prompts(count: int) -> list[str]:
    """Different prompts of different lengths."""
    made = [ask.format(subject) for subject in SUBJECTS for ask in ASKS]
    return [(p + " Answer briefly, please.") if i % 3 else p for i, p in enumerate(made[:count])]


def load_reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_random_adapters(base: Any, folder: Path) -> dict[str, Path]:
    """Adapters with random A and B, saved by PEFT; B is large enough to change the text."""
    from peft import LoraConfig, get_peft_model

    made = {}
    for seed, (name, fields) in enumerate(RANDOM.items()):
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **fields))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.05 / parameter.shape[1] ** 0.5)
        model.peft_config["default"].base_model_name_or_path = BASE_ID
        # "auto" would ask the Hub whether the vocabulary was resized.
        model.save_pretrained(folder / name, save_embedding_layers=False)
        base = model.unload()
        made[name] = folder / name
    return made


def with_adapters(base: Any, adapters: dict[str, Path]) -> Any:
    """One PEFT model with all adapters."""
    from peft import PeftModel

    names = list(adapters)
    model = PeftModel.from_pretrained(base, adapters[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(adapters[name], adapter_name=name)
    return model.eval()


@torch.no_grad()
def reference_tokens(
    model: Any, adapter: str | None, ids: list[int], new: int
) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the logits behind each [new, vocabulary], alone in the batch."""
    options = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "do_sample": False,
        "max_new_tokens": new,
        "min_new_tokens": new,
        "output_logits": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
    }
    eos, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        if adapter is None:
            with model.disable_adapter():
                out = model.generate(**{**options, "min_new_tokens": None})
        else:
            model.set_adapter(adapter)
            out = model.generate(**{**options, "min_new_tokens": None})
    finally:
        model.generation_config.eos_token_id = eos
    return out.sequences[0, len(ids) :].tolist(), torch.stack(out.logits)[:, 0]


def run_engine(engine: Any, jobs: Sequence[Job]) -> dict[str, Result]:
    """Results by job id, all jobs submitted at once to a started engine."""
    done: dict[str, Result] = {}
    ready = threading.Event()

    def finished(outcomes: Sequence[Outcome]) -> None:
        done.update((o.claim.job.job_id, o.result) for o in outcomes)
        if len(done) >= len(jobs):
            ready.set()

    engine._on_finished = finished
    engine.submit([Claim(job, 1, 1, 0, 0) for job in jobs])
    if not ready.wait(3600):
        raise TimeoutError(f"{len(done)} of {len(jobs)} jobs ended: {engine.load}")
    return done


def compare(
    engine: Any, model: Any, names: Sequence[str | None], count: int, new: int
) -> dict[str, Any]:
    """Run everything both ways and count mismatches."""
    asked = [(name, p) for p in prompts(count) for name in names]
    jobs = [
        Job(
            adapter_id=name,
            messages=[{"role": "user", "content": prompt}],
            sampling_params={"max_new_tokens": new, "ignore_eos": True},
        )
        for name, prompt in asked
    ]
    before = dict(engine.load)
    results = run_engine(engine, jobs)
    tokens = mismatched = explained = 0
    worst = 0.0
    tokenizer = engine.base.tokenizer
    for job in jobs:
        result = results[job.job_id]
        assert result.state == "succeeded", result.error
        chat = [m.model_dump() for m in job.messages or ()]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        wanted, logits = reference_tokens(model, job.adapter_id, ids, new)
        tokens += new
        if list(result.token_ids) == wanted:
            continue
        mismatched += 1
        pairs = zip(result.token_ids, wanted, strict=True)
        at = next(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)
        gap = (logits[at, wanted[at]] - logits[at, result.token_ids[at]]).item()
        worst = max(worst, gap)
        explained += gap < EXPLAINED_GAP
    return {
        "jobs": len(jobs),
        "adapters": [n or "(base)" for n in names],
        "prompts": count,
        "tokens": tokens,
        "mismatched_jobs": mismatched,
        "explained_by_gap": explained,
        "largest_gap": worst,
        "steps": engine.load["steps"] - before["steps"],
        "mixed_steps": engine.load["mixed_steps"] - before["mixed_steps"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--adapters", nargs="*", help="only these (default: all)")
    parser.add_argument("--home", type=Path, default=ROOT / ".lorabatch")
    args = parser.parse_args()
    from lorabatch_worker.build import build_engine
    from lorabatch_worker.bundled import bundled_checkpoint

    warnings.simplefilter("ignore")
    folder = bundled_checkpoint(BASE_ID, args.home)
    adapters = {p.parent.name: p.parent for p in sorted(SHIPPED.glob("*/adapter_config.json"))}
    adapters |= write_random_adapters(load_reference(folder), args.home / "parity-adapters")
    adapters = {n: p for n, p in adapters.items() if not args.adapters or n in args.adapters}
    model = with_adapters(load_reference(folder), adapters)
    settings = Settings.load(
        home=args.home,
        adapters=",".join(f"{name}={path}" for name, path in adapters.items()),
        dtype="float32",
        threads=args.threads,
    )
    engine = build_engine(settings)
    engine.start(lambda ids: None, lambda outcomes: None)
    names = list(adapters) if args.adapters else [None, *adapters]
    report = compare(engine, model, names, args.prompts, args.new)
    engine.drain(0)
    record("parity", dtype="float32", **report)


if __name__ == "__main__":
    main()
