"""Train the four demo adapters (sql, pirate, html, json) on a CPU, save and judge them.

    python examples/train_adapters.py [NAME ...] [--base FOLDER_OR_HUB_ID] [--out FOLDER]

Each one is a plain LoRA adapter in PEFT format, trained with AdamW on the pairs of
`adapter_data` (loss on the answer's tokens only; frozen weights in bf16, LoRA in fp32), saved in
bf16 under OUT/NAME and read back from there. It is judged in fp32, greedy, on prompts it has not
seen: every answer must meet the adapter's predicate and end by itself, and every answer of the
base model must fail it. Exits 1 where one of these does not hold. `--judge` skips the training.

Needs torch, transformers, peft and safetensors. Does not cover: evaluation beyond the form of
the answers, other base models (layer numbers are those of SmolLM2-135M), GPUs. The same seed
gives the same data everywhere but, through rounding, the same weights only on like machines.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from adapter_data import (
    HELD_OUT,
    PREDICATES,
    SHARED,
    Pair,
    html_pairs,
    json_pairs,
    pirate_pairs,
    sql_pairs,
)
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
BATCH = 8
WARMUP_STEPS = 5
MAX_NEW_TOKENS = 48
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Recipe:
    """How one adapter is made; `layers` None means all of them."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    layers: tuple[int, ...] | None
    steps: int
    lr: float
    pairs: Callable[[int], list[Pair]]
    rslora: bool = False
    seed: int = 7


RECIPES: dict[str, Recipe] = {
    "sql": Recipe(4, 8, ("q_proj", "v_proj"), None, 70, 2e-3, sql_pairs),
    "pirate": Recipe(8, 16, ATTENTION, tuple(range(12, 26)), 90, 2e-3, pirate_pairs),
    "html": Recipe(
        16,
        16,
        ("o_proj", "down_proj"),
        tuple(range(21, 29)),
        90,
        1e-3,
        html_pairs,
        rslora=True,
    ),
    "json": Recipe(
        6,
        12,
        ("gate_proj", "up_proj", "down_proj"),
        tuple(range(17, 28)),
        150,
        1.5e-3,
        json_pairs,
    ),
}


@dataclass(frozen=True)
class Answer:
    """What a model said, and whether it stopped by itself."""

    text: str
    ended: bool


def load_base(base: str, dtype: torch.dtype) -> PreTrainedModel:
    """The base model, frozen, for reading only."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return model.eval().requires_grad_(False)


def chat(tok: PreTrainedTokenizerBase, question: str) -> str:
    """The prompt's text up to where the answer begins."""
    messages = [{"role": "user", "content": question}]
    return str(tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode(tok: PreTrainedTokenizerBase, pair: Pair) -> tuple[list[int], int]:
    """(token ids of prompt, answer and end token; how many of them are the prompt's)."""
    prompt = tok(chat(tok, pair[0]), add_special_tokens=False)["input_ids"]
    answer = tok(pair[1], add_special_tokens=False)["input_ids"]
    return [*prompt, *answer, tok.eos_token_id], len(prompt)


def batch_loss(model: PeftModel, rows: list[tuple[list[int], int]], pad: int) -> torch.Tensor:
    """Mean cross entropy of the answers' tokens; logits are made for these alone."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in rows])
    wanted = torch.tensor(
        [[start <= i < len(row) for i in range(1, width)] for row, start in rows], dtype=torch.bool
    )
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    logits = causal.lm_head(hidden[:, :-1][wanted])
    return cross_entropy(logits.float(), ids[:, 1:][wanted])


def train(recipe: Recipe, base: str, tok: PreTrainedTokenizerBase) -> PeftModel:
    """A PEFT model on a fresh base; prints the loss as it goes."""
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        layers_to_transform=list(recipe.layers) if recipe.layers else None,
        use_rslora=recipe.rslora,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_base(base, torch.bfloat16), config)
    pairs = recipe.pairs(recipe.seed)
    data = [encode(tok, pair) for pair in pairs]
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=0.0)
    rng, began = random.Random(recipe.seed), time.perf_counter()
    for step in range(recipe.steps):
        rate = min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / recipe.steps)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * rate
        loss = batch_loss(model, rng.sample(data, BATCH), int(tok.pad_token_id))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 10 == 0 or step == recipe.steps - 1:
            seconds = time.perf_counter() - began
            print(f"  step {step:3d}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
    return model.eval()


def save(model: PeftModel, folder: Path) -> None:
    """Two files: the config with the hub's name for the base, and the weights in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = HUB_ID, True
    fields = config.to_dict()
    fields["target_modules"] = sorted(fields["target_modules"])
    text = json.dumps(fields, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {key: value.to(torch.bfloat16).contiguous() for key, value in state.items()}
    weights = folder / "adapter_model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)


def ask(
    model: PreTrainedModel | PeftModel,
    tok: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[Answer]:
    """Greedy answers, all prompts in one batch."""
    texts = [chat(tok, prompt) for prompt in prompts]
    batch = tok(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    with torch.inference_mode():
        out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    made = out[:, batch["input_ids"].shape[1] :]
    ended = (made == tok.eos_token_id).any(dim=1).tolist()
    said = tok.batch_decode(made, skip_special_tokens=True)
    return [Answer(text, end) for text, end in zip(said, ended, strict=True)]


def judge(name: str, base: str, folder: Path, tok: PreTrainedTokenizerBase) -> bool:
    """Read the adapter back, ask it and the base model, print both; true where all is well."""
    prompts, meets = HELD_OUT[name], PREDICATES[name]
    extra = [prompt for prompt in SHARED if prompt not in prompts]
    model = load_base(base, torch.float32)
    plain = ask(model, tok, prompts)
    answers = ask(PeftModel.from_pretrained(model, folder), tok, prompts + extra)
    for prompt, before, after in zip(prompts, plain, answers, strict=False):
        mark = "ok  " if meets(after.text) and after.ended and not meets(before.text) else "FAIL"
        end = "" if after.ended else " [no end]"
        print(f"{mark} {prompt}\n     {after.text!r}{end}\n     base: {before.text!r}")
    for prompt, answer in zip(extra, answers[len(prompts) :], strict=True):
        print(f"also {prompt}\n     {answer.text!r}")
    judged = answers[: len(prompts)]
    good = sum(meets(a.text) and a.ended for a in judged)
    base_good = sum(meets(a.text) for a in plain)
    size = (folder / "adapter_model.safetensors").stat().st_size / 1024
    print(
        f"{name}: {good} of {len(prompts)} held-out prompts, base {base_good}; {size:.0f} KiB\n",
        flush=True,
    )
    return good == len(prompts) and base_good == 0


def main() -> int:
    """Train, save and judge the adapters named on the command line, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--base", default=HUB_ID, help="folder or hub id of the base model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "adapters")
    parser.add_argument("--judge", action="store_true", help="judge what OUT holds, train nothing")
    args = parser.parse_args()
    names: list[str] = args.names or list(RECIPES)
    if unknown := sorted(set(names) - set(RECIPES)):
        parser.error(f"no recipe for {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    tok = AutoTokenizer.from_pretrained(args.base)
    well = True
    for name in names:
        print(f"{name}: {RECIPES[name]}", flush=True)
        if not args.judge:
            save(train(RECIPES[name], args.base, tok), args.out / name)
        well &= judge(name, args.base, args.out / name, tok)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
