"""The base model: found by name, loaded once, shared by every adapter.

`LORABATCH_BASE_MODEL` is a folder, or a Hub id with an optional @revision. A Hub id that an
installed package ships is taken from there first, so that the default needs no network.
No remote code is run. Raises UnsupportedModel, SettingsError.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorabatch.errors import SettingsError, UnsupportedModel
from lorabatch.settings import Settings, is_path
from lorabatch_kernels import native
from lorabatch_worker.adapters.weights import Adapter
from lorabatch_worker.bundled import bundled_checkpoint, find_gguf
from lorabatch_worker.free_gpu import ANY, take_gpu
from lorabatch_worker.threads import compute_with

__all__ = ["BaseModel", "load_base_model"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BaseModel:
    """A loaded causal language model, its tokenizer and the token ids that end a text. A job may
    have `max_context_tokens`, the model has `positions` (None: any number)."""

    name: str
    folder: Path
    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    eos_ids: frozenset[int]
    max_context_tokens: int
    positions: int | None = None

    @property
    def description(self) -> dict[str, str]:
        """For people: also what computes its adapters and, on a CPU, its layers."""
        kernels = "triton"
        if self.device.type == "cpu":
            problem = f"they take no {self.dtype}"
            if native.supports(self.dtype):
                problem = native.problem() or ""
            kernels = f"torch operators, slower: {problem}" if problem else "compiled"
        return {
            "base_model": self.name,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "kernels": kernels,
        }

    def vocabulary_of(self, adapter: Adapter | None) -> int:
        """Token ids that there are: its own, or an adapter's that adds tokens."""
        own = adapter.vocabulary_size if adapter else None
        return int(self.model.config.get_text_config().vocab_size) if own is None else own

    def tokenizer_for(self, adapter: Adapter | None) -> Any:
        """Its own, or that of an adapter that adds tokens."""
        own = adapter.tokenizer if adapter else None
        return self.tokenizer if own is None else own


def load_base_model(settings: Settings) -> BaseModel:
    """Load by name onto the device, in the dtype that settings ask for."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    quiet: Any = logging.disable_progress_bar
    quiet()
    device = pick_device(settings.device, settings.home)
    dtype = pick_dtype(settings.dtype, device)
    if device.type == "cpu":
        # One here; the engine's thread takes all. The OpenMP runtime lets its threads spin between
        # two layers, which are microseconds apart, only while there are no more of them than cores.
        compute_with(1)
    folder = locate(settings)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # noqa: BLE001 - files can be broken in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedModel(
            f"LORABATCH_BASE_MODEL: {settings.base_model!r} cannot be loaded: {reason}"
        ) from None
    model, info = loaded
    if info["missing_keys"]:
        lacking = ", ".join(sorted(info["missing_keys"])[:3])
        raise UnsupportedModel(
            f"LORABATCH_BASE_MODEL: {settings.base_model!r} lacks weights that "
            f"{type(model).__name__} needs ({lacking}); wanted a complete causal language model"
        )
    model = model.to(device).eval().requires_grad_(False)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = min(settings.max_context_tokens, positions or settings.max_context_tokens)
    return BaseModel(
        name=settings.base_model,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        eos_ids=_eos_ids(model, tokenizer),
        max_context_tokens=longest,
        positions=positions,
    )


def locate(settings: Settings) -> Path:
    """The folder with the base model's files, fetched from the Hub if need be."""
    name, _, revision = settings.base_model.partition("@")
    if is_path(settings.base_model):
        folder = Path(settings.base_model).expanduser().resolve()
        if not (folder / "config.json").is_file():
            raise SettingsError(
                f"LORABATCH_BASE_MODEL: no config.json in {settings.base_model!r}; "
                "give a folder of a transformers checkpoint, or a Hub id"
            )
        return folder
    if not revision and find_gguf(name) is not None:
        return bundled_checkpoint(name, settings.home)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        path = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
    except Exception as error:  # noqa: BLE001 - the hub raises from several trees
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModel(
            f"LORABATCH_BASE_MODEL: {settings.base_model!r} is no folder here and cannot be had "
            f"from the Hub: {reason}"
        ) from None
    return Path(path)


def pick_device(wanted: str, home: Path) -> torch.device:
    if wanted == ANY:
        cuda = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        ids = [str(torch.cuda.get_device_properties(number).uuid) for number in cuda]
        return torch.device("cuda", take_gpu(home, ids))
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise SettingsError(
                f"LORABATCH_DEVICE: {wanted!r} asked for, but torch sees {count} CUDA devices; "
                "set cpu or auto, or install torch with CUDA"
            )
    return device


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    if wanted == "auto":
        fast = device.type != "cpu" or has_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    return DTYPES[wanted]


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies bf16 itself, which makes it the faster of the two."""
    try:
        words = set(cpuinfo.read_text().split())
    except OSError:
        return False
    return not words.isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """End tokens by generation config, model config and tokenizer together."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            found.update(ids if isinstance(ids, (list, tuple)) else [ids])
    return frozenset(found)
