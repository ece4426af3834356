"""Parity by kind of adapter and family of models: tokens of transformers + PEFT, in fp32.

    python -m tests.parity_kinds [--families llama qwen3 ...] [--new 12]

Each kind is an adapter with random weights that PEFT itself writes. `alone`: its prompts run by
themselves; `mixed`: in the same steps as the base model and every other kind. A cell counts tokens
that are PEFT's, given the tokens before. Families are tiny random models, but for SmolLM2-135M.
Prints a table and appends a JSON line to bench/results.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from bench.record import record
from lorabatch.errors import InvalidAdapter
from tests.models import (
    bundled_folder,
    eager,
    generate,
    load_adapter,
    load_with_peft,
    random_adapter,
    runner_of,
    small_vocabulary,
    tiny_model,
)

REAL = "SmolLM2-135M"
FAMILIES = [REAL, "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "mistral", "phi3"]
EMBEDDING = {"gpt2": "wte"}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"r": 8},
    "rsLoRA": {"r": 3, "use_rslora": True},
    "rank_pattern, alpha_pattern": {"rank_pattern": {"1": 2}, "alpha_pattern": {"0": 20}},
    "layers_to_transform": {
        "r": 5,
        "layers_to_transform": [1],
        "target_modules": ["q_proj", "qkv_proj", "c_attn"],
    },
    "DoRA": {"r": 5, "use_dora": True},
    "DoRA, rsLoRA": {"r": 2, "use_dora": True, "use_rslora": True},
    "bias": {"r": 4, "bias": "lora_only"},
    "lora_bias": {"r": 4, "lora_bias": True},
    "lm_head": {"r": 6, "target_modules": ["q_proj", "qkv_proj", "c_attn", "lm_head"]},
    "DoRA on lm_head": {"r": 4, "use_dora": True, "target_modules": ["lm_head"]},
    "embedding": {"r": 5, "target_modules": ["EMBEDDING"]},
    "DoRA on embedding": {"r": 3, "use_dora": True, "target_modules": ["EMBEDDING"]},
    "trainable_token_indices": {"trainable_token_indices": {"EMBEDDING": [200, 5, 9]}},
    "modules_to_save: head": {"modules_to_save": ["lm_head"]},
    "modules_to_save: both ends": {"modules_to_save": ["EMBEDDING", "lm_head"]},
}
PROMPTS = [[5 + n, 9, 200, 31, 7, *range(40, 40 + 3 * n)] for n in range(len(KINDS) + 1)]


def fields_for(family: str, fields: dict[str, Any]) -> dict[str, Any]:
    """With this family's name of the embedding."""
    name = EMBEDDING.get(family, "embed_tokens")

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {named(k): v for k, v in value.items()}
        if isinstance(value, list):
            return [named(v) for v in value]
        return name if value == "EMBEDDING" else value

    return {key: named(value) for key, value in fields.items()}


def base_of(family: str) -> Any:
    if family != REAL:
        return tiny_model(small_vocabulary(family))
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(bundled_folder(), dtype=torch.float32).eval()


def compared(family: str, folder: Path, new: int) -> dict[str, Any]:
    """By kind: tokens that are PEFT's alone and mixed, or why the adapter is refused."""
    model = base_of(family)
    runner = runner_of(copy.deepcopy(model), slots=len(KINDS))
    found: dict[str, Any] = {}
    slots: dict[str, int] = {}
    for number, (kind, fields) in enumerate(KINDS.items()):
        try:
            path = random_adapter(model, folder / str(number), number, **fields_for(family, fields))
        except ValueError as error:
            found[kind] = f"not made by PEFT: {error}"
            continue
        try:
            load_adapter(runner, path, number)
        except InvalidAdapter as error:
            found[kind] = f"refused: {error}"
            continue
        slots[kind] = number
    order = [-1, *slots.values()]
    mixed = generate(runner, PROMPTS[: len(order)], order, new, 7).argmax(-1)
    for row, (kind, slot) in enumerate(slots.items(), start=1):
        prompt = PROMPTS[row]
        reference = load_with_peft(copy.deepcopy(model), folder / str(slot))
        alone = generate(runner, [prompt], [slot], new, 7)[0].argmax(-1)
        found[kind] = {
            name: int((tokens == eager(reference, prompt, tokens.tolist()).argmax(-1)).sum())
            for name, tokens in (("alone", alone), ("mixed", mixed[row]))
        }
        found[kind]["differs_from_base"] = bool(
            (eager(model, prompt, alone.tolist()).argmax(-1) != alone).any()
        )
        del reference
    return found


def table(found: dict[str, dict[str, Any]], new: int) -> str:
    lines = ["| kind | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for kind in KINDS:
        cells = []
        for cells_of in found.values():
            cell = cells_of.get(kind)
            if isinstance(cell, dict):
                cells.append(f"{cell['alone']}/{new}, {cell['mixed']}/{new}")
            else:
                cells.append(str(cell).partition(":")[0])
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--new", type=int, default=12)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    found = {}
    for family in args.families:
        with tempfile.TemporaryDirectory() as folder:
            found[family] = compared(family, Path(folder), args.new)
    print(table(found, args.new))
    cells = [c for kinds in found.values() for c in kinds.values()]
    good = [c for c in cells if isinstance(c, dict)]
    record(
        "parity_kinds",
        dtype="float32",
        new_tokens=args.new,
        adapters=len(good),
        tokens=2 * args.new * len(good),
        mismatched=sum(2 * args.new - c["alone"] - c["mixed"] for c in good),
        families=found,
    )


if __name__ == "__main__":
    main()
