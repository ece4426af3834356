"""Tiny random models, and the logits that the engine's runner and the model alone give.

`tiny_config(kind)` makes a configuration of any architecture small enough to build in
milliseconds; `checkpoint` saves one as a folder with the bundled model's tokenizer.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from lorabatch import Job
from lorabatch.ledger import Claim
from lorabatch_worker.adapters.base_tokenizer import BaseTokenizer
from lorabatch_worker.adapters.weights import AdapterTarget, read_adapter
from lorabatch_worker.base_model import BaseModel
from lorabatch_worker.bundled import bundled_checkpoint
from lorabatch_worker.model_runner import ModelRunner
from lorabatch_worker.scheduler import Chunk
from lorabatch_worker.sequence import Sequence as Running

ROOT = Path(__file__).parents[1]
BUNDLED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

logging.disable_progress_bar()

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "sliding_window": 6,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "query_pre_attn_scalar": 16,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 4,
    "n_inner": 96,
    "d_model": 64,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "rotary_dim": 16,
}


def bundled_folder() -> Path:
    """The bundled model's checkpoint, made once and kept in the repository's data folder."""
    return bundled_checkpoint(BUNDLED_ID, ROOT / ".lorabatch")


def tiny_config(kind: str, **fields: Any) -> Any:
    """A small configuration: those of COMMON that the class knows, then `fields`."""
    known = type(AutoConfig.for_model(kind))().to_dict()
    return AutoConfig.for_model(kind, **{k: v for k, v in COMMON.items() if k in known} | fields)


def small_vocabulary(kind: str, **fields: Any) -> Any:
    """Configurations differ in what they call the end tokens; none lies outside of the model."""
    return tiny_config(kind, **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | fields)


def tiny_model(config: Any, seed: int = 0) -> Any:
    """A random model in fp32 whose norms and biases are not the identity."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.normal_(centre, 0.1)
    return model.eval().requires_grad_(False)


def as_base(model: Any, tokenizer: Any = None) -> BaseModel:
    return BaseModel(
        name="acme/tiny",
        folder=Path(),
        model=model,
        tokenizer=tokenizer,
        device=torch.device("cpu"),
        dtype=next(model.parameters()).dtype,
        eos_ids=frozenset(),
        max_context_tokens=256,
    )


def runner_of(
    model: Any, slots: int = 4, rank: int = 8, block_size: int = 8, rows: bool | None = None
) -> ModelRunner:
    """A ModelRunner on a model; the model is changed by it."""
    torch.set_num_threads(1)
    return ModelRunner(as_base(model), 1024, block_size, slots, rank, rows=rows)


def checkpoint(folder: Path, kind: str = "llama", **fields: Any) -> Path:
    """Save a tiny random model with the bundled tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder())
    config = tiny_config(
        kind,
        **{
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "intermediate_size": 64,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 512,
            "initializer_range": 0.3,
            "tie_word_embeddings": True,
            **{f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")},
            **fields,
        },
    )
    model = tiny_model(config)
    if kind == "llama":
        # Far from uniform: where thousands of tokens are about as likely, rounding picks one.
        model.model.norm.weight.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# What PEFT warns of when it makes or loads adapters such as the tests want.
PEFTS_WARNINGS = (
    "`is_gradient_checkpointing` is deprecated",
    "`lora_bias=True` was passed but the targeted layer",
    ".*LoRA tensor.* have invalid shape",  # lora_B's biases
    "Model has `tie_word_embeddings=True`",
    "fan_in_fan_out is set to .* but the target module is",
)


@contextmanager
def quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in PEFTS_WARNINGS:
            warnings.filterwarnings("ignore", message)
        yield


def load_with_peft(model: nn.Module, folder: Path) -> Any:
    from peft import PeftModel

    with quiet_peft():
        return PeftModel.from_pretrained(model, folder).eval()


def with_lora(model: nn.Module, **fields: Any) -> Any:
    """PEFT's own model around this one, which is changed by it."""
    from peft import LoraConfig, get_peft_model

    conv = any(isinstance(m, Conv1D) for m in model.modules())
    config = LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=conv, **fields)
    with quiet_peft():
        tuned: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    tuned.peft_config["default"].base_model_name_or_path = "acme/tiny"
    return tuned.eval()


def resized(model: Any, tokens: int) -> Any:
    """A copy with an embedding and a head of so many tokens; new rows are random."""
    made = copy.deepcopy(model)
    made.resize_token_embeddings(tokens, mean_resizing=False)
    torch.manual_seed(tokens)
    for end in (made.get_input_embeddings(), made.get_output_embeddings()):
        rows = end.weight.data[model.get_input_embeddings().num_embeddings :]
        rows.normal_(0, 1.2 * end.weight.std().item())
    return made.requires_grad_(False)


def random_adapter(
    model: nn.Module, folder: Path, seed: int = 0, save_embedding: bool = False, **fields: Any
) -> Path:
    """An adapter with random weights, written by PEFT; all linear layers unless said otherwise."""
    torch.manual_seed(seed)
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    tuned = with_lora(copy.deepcopy(model), **defaults | fields)
    for name, parameter in tuned.named_parameters():
        own_bias = parameter.requires_grad and name.endswith("bias")
        if own_bias or "lora_B" in name or "lora_embedding_B" in name:
            nn.init.normal_(parameter, std=0.2)
        elif "lora_embedding_A" in name:
            nn.init.normal_(parameter, std=1.0)
        elif "trainable_tokens_delta" in name or "modules_to_save" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif "lora_magnitude_vector" in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
    with quiet_peft():
        tuned.save_pretrained(folder, save_embedding_layers=save_embedding)  # "auto" asks the Hub
    return folder


def load_adapter(
    runner: ModelRunner, folder: Path, slot: int, tokenizer: BaseTokenizer | None = None
) -> set[str]:
    """Put an adapter's files into a slot: the layers that it changes."""
    target = AdapterTarget(
        base_names=frozenset({"acme/tiny"}),
        shapes={n: (s.in_features, s.out_features) for n, s in runner.sites.items()},
        modules=frozenset(),
        max_rank=8,
        dtype=torch.float32,
        layer=runner.layers.__getitem__,
        ends=runner.ends,
        tokenizer=tokenizer,
    )
    adapter = read_adapter("x", folder, target)
    runner.changed_ends.load(slot, adapter.vocabulary)
    for name, weights in adapter.sites.items():
        site = runner.sites[name]
        site.put(slot, weights)
    return set(adapter.sites)


def assert_same_logits(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4 * max(1.0, wanted.std().item()))


def claim(job: Job, attempt: int = 1) -> Claim:
    return Claim(job, attempt, attempt, 1, 2)


def generate(
    runner: ModelRunner, prompts: Sequence[list[int]], slots: Sequence[int], new: int, chunk: int
) -> Tensor:
    """Logits [prompts, new, vocabulary] of greedy decoding, all prompts mixed in every step; as
    wide as the widest of any step, -infinity where they were not."""
    job = Job(prompt="-", sampling_params={"max_new_tokens": new})
    running = [Running(claim(job), list(p), None) for p in prompts]
    for sequence, slot in zip(running, slots, strict=True):
        sequence.slot = slot
        runner.blocks.allocate(sequence)
    found: list[list[Tensor]] = [[] for _ in running]
    while any(len(rows) < new for rows in found):
        chunks = [
            Chunk(s, s.computed, min(s.length, s.computed + chunk))
            for s, rows in zip(running, found, strict=True)
            if len(rows) < new
        ]
        chunks.sort(key=lambda c: c.end - c.start > 1)
        rows = iter(runner.forward(chunks))
        for c in chunks:
            c.sequence.computed = c.end
            if c.samples:
                row = next(rows).to("cpu", copy=True)
                found[running.index(c.sequence)].append(row)
                c.sequence.output.append(int(row.argmax()))
                runner.blocks.grow(c.sequence)
    for sequence in running:
        runner.blocks.release(sequence, keep=False)
    widest = max(len(row) for rows in found for row in rows)
    made = torch.full((len(found), new, widest), -torch.inf, dtype=found[0][0].dtype)
    for number, rows in enumerate(found):
        for place, row in enumerate(rows):
            made[number, place, : len(row)] = row
    return made


@torch.no_grad()
def eager(model: Any, prompt: list[int], tokens: Sequence[int]) -> Tensor:
    """Logits [n, vocabulary] that the model alone gives before each of `tokens`."""
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits[len(prompt) - 1 :]
