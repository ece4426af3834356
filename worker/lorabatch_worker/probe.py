"""Refuse, before any job runs, a model that the engine would compute wrong.

Some classes ignore the attention implementation that they are told to use, keep a state that
is not keys and values, or choose RoPE frequencies by the longest position in the batch. The
configuration is checked first; then a few tokens go through the engine, packed, in prefill
and decode, and must match the model's own eager attention. Raises UnsupportedModel.
Not covered: prompts longer than a sliding window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorabatch.errors import UnsupportedModel
from lorabatch.job import Job, SamplingParams
from lorabatch.ledger import Claim
from lorabatch_worker.scheduler import Chunk
from lorabatch_worker.sequence import Sequence

if TYPE_CHECKING:
    from lorabatch_worker.base_model import BaseModel
    from lorabatch_worker.model_runner import ModelRunner

__all__ = ["PROBE_BLOCKS", "check_attention", "check_config", "eager_logits"]

# What the three sequences need, whatever the block size.
PROBE_BLOCKS = 8
PROBE_ROWS = 3
PROBE_ROW_BLOCKS = 8
BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# Largest difference of a logit, as a share of the logits' standard deviation.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}


def check_config(config: Any) -> None:
    """Refuse what the configuration alone gives away."""
    name = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name}: an encoder-decoder model; wanted a decoder-only one")
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [v for v in rope.values() if isinstance(v, dict)] or [rope]
    for parameters in nested:
        kind = parameters.get("rope_type", parameters.get("type"))
        if kind in BATCH_DEPENDENT_ROPE:
            raise UnsupportedModel(
                f"{name}: RoPE type {kind!r} picks its frequencies by the longest sequence in the "
                "batch, so one job would change another's tokens; wanted default, linear, yarn or "
                "llama3"
            )
    recurrent = {
        kind
        for kind in getattr(config, "layer_types", None) or ()
        if kind not in ("full_attention", "sliding_attention", "chunked_attention")
    }
    if recurrent or "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        kinds = sorted(recurrent) or ["chunked_attention"]
        raise UnsupportedModel(
            f"{name}: layers of type {', '.join(kinds)}; wanted full_attention or sliding_attention"
        )


@torch.inference_mode()
def eager_logits(base: BaseModel, block_size: int) -> Tensor:
    """What the model says by itself, before anything of it is replaced: the last two positions'
    logits [3, 2, vocabulary] of three short prompts, with its own attention."""
    model: Any = base.model
    try:
        model.set_attn_implementation("eager")
        ids = [torch.tensor([prompt], device=base.device) for prompt in _prompts(model, block_size)]
        rows = [model(input_ids=one, use_cache=False).logits[0, -2:].float() for one in ids]
    except Exception as error:  # a class may fail in any way on a call that it is not made for
        raise _first_step_failed(model, error) from error
    return torch.stack(rows)


@torch.inference_mode()
def check_attention(runner: ModelRunner, implementation: str, expected: Tensor) -> None:
    """Switch the model to the engine's attention and run the same prompts through the engine."""
    model, name = runner.model, type(runner.model).__name__
    prompts = _prompts(model, runner.blocks.block_size)
    try:
        model.set_attn_implementation(implementation)
        runner.cache.calls = 0
        got, steps = _packed(runner, prompts)
    except Exception as error:  # as above
        raise _first_step_failed(model, error) from error
    layers = model.config.get_text_config().num_hidden_layers
    if runner.cache.calls != steps * layers:
        raise UnsupportedModel(
            f"{name}: {runner.cache.calls} attention calls in {steps} steps of {layers} layers; "
            "this class does not use transformers' attention interface in every layer"
        )
    difference = ((got - expected).abs().max() / expected.std()).item()
    limit = TOLERANCE[runner.base.dtype]
    if not difference <= limit:
        raise UnsupportedModel(
            f"{name}: packed logits differ from eager attention by {difference:.1e} of their "
            f"standard deviation, allowed {limit:.0e}: something in this class is not computed"
        )


def _prompts(model: Any, block_size: int) -> list[list[int]]:
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(vocabulary, (n,), generator=generator).tolist()
        for n in (3, block_size + 3, 7)
    ]


def _first_step_failed(model: Any, error: Exception) -> UnsupportedModel:
    name, reason = type(model).__name__, str(error).strip().splitlines() or [""]
    return UnsupportedModel(f"{name}: a first step failed: {type(error).__name__}: {reason[0]}")


def _packed(runner: ModelRunner, prompts: list[list[int]]) -> tuple[Tensor, int]:
    """The same logits through the engine, and its steps: prefill in two chunks, then decode."""
    sequences = [_sequence(prompt[:-1]) for prompt in prompts]
    for sequence in sequences:
        runner.blocks.allocate(sequence)
    runner.forward([Chunk(s, 0, 1) for s in sequences])
    prefilled = runner.forward([Chunk(s, 1, s.length) for s in sequences])
    for sequence, prompt in zip(sequences, prompts, strict=True):
        sequence.output.append(prompt[-1])
        runner.blocks.grow(sequence)
    decoded = runner.forward([Chunk(s, s.length - 1, s.length) for s in sequences])
    for sequence in sequences:
        runner.blocks.release(sequence, keep=False)
    return torch.stack([prefilled, decoded], dim=1).float(), 3


def _sequence(prompt: list[int]) -> Sequence:
    job = Job(job_id="probe", prompt="-", sampling_params=SamplingParams(max_new_tokens=1))
    return Sequence(Claim(job, 0, 0, 0, 0), list(prompt), None)
