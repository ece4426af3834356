"""llama.cpp behind two pipes; run by the Python of an environment with llama-cpp-python and gguf.

    PYTHON llamacpp_child.py SPEC.json

SPEC: gguf (file of the base model), heads (query and key heads), dtype, requests [[ids, adapter
name or null], ...], adapters {name: folder}, max_seqs, max_step_tokens, threads, new. A context of
llama.cpp has one set of adapters at a time: requests are grouped by adapter, and up to `max_seqs`
of a group run together. GGUF files are made beside SPEC.json: the base's matrices in `dtype`,
adapters in fp32. The KV cache is llama.cpp's own default, fp16. Prints one JSON line when all is
loaded, then reads lines: for each, runs all requests and prints {"seconds": ...}. Imports
nothing of ours.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as api
import numpy as np
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

KINDS = {
    "float32": gguf.GGMLQuantizationType.F32,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
}
NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
OWN_FIELDS = ("general.architecture", "general.file_type", "general.quantization_version")


def write_base(source: Path, path: Path, dtype: str) -> None:
    """The same model with its matrices in `dtype`; vectors stay fp32."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in OWN_FIELDS:
            kind, *inner = field.types
            writer.add_key_value(name, field.contents(), kind, inner[-1] if inner else None)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = values.reshape([int(n) for n in reversed(tensor.shape)])
        kind = KINDS[dtype] if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    _close(writer)


def write_adapter(folder: Path, path: Path, heads: tuple[int, int]) -> None:
    """A PEFT adapter as a GGUF one; q and k rows in the order of llama.cpp's base models."""
    config = json.loads((folder / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config["lora_alpha"]))
    for key, values in load_file(folder / "adapter_model.safetensors").items():
        words = key.split(".")
        layer, module, side = words[words.index("layers") + 1], words[-3], words[-2]
        count = dict(zip(("q_proj", "k_proj"), heads, strict=True)).get(module)
        turned = _interleaved(values, count) if count and side == "lora_B" else values
        name = f"blk.{layer}.{NAMES[module]}.weight.{side.lower()}"
        writer.add_tensor(name, np.ascontiguousarray(turned, np.float32))
    _close(writer)


def _interleaved(rows: Any, heads: int) -> Any:
    """Rows of each head's two halves in turns."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model:
    """The base model in one context, and its adapters."""

    def __init__(self, spec: dict[str, Any], folder: Path) -> None:
        api.llama_backend_init()
        base = folder / "base.gguf"
        write_base(Path(spec["gguf"]), base, spec["dtype"])
        self.seqs = min(spec["max_seqs"], len(spec["requests"]))
        self.step_tokens = spec["max_step_tokens"]
        self.model = _found(
            api.llama_model_load_from_file(bytes(base), api.llama_model_default_params()), base
        )
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        longest = max(len(ids) for ids, _ in spec["requests"]) + spec["new"]
        params = api.llama_context_default_params()
        params.n_ctx = self.seqs * (longest + -longest % 256)
        params.n_seq_max = self.seqs
        params.n_batch = params.n_ubatch = self.step_tokens
        params.n_threads = params.n_threads_batch = spec["threads"]
        self.context = _found(api.llama_init_from_model(self.model, params), "a context")
        self.batch = api.llama_batch_init(self.step_tokens, 0, 1)
        self.adapters = {}
        for name, source in spec["adapters"].items():
            path = folder / f"{name}.gguf"
            write_adapter(Path(source), path, tuple(spec["heads"]))
            self.adapters[name] = _found(api.llama_adapter_lora_init(self.model, bytes(path)), name)

    def use(self, name: str | None) -> None:
        """One adapter from here on, or none."""
        some = [self.adapters[name]] if name else []
        adapters = (api.llama_adapter_lora_p_ctypes * len(some))(*some)
        scales = (ctypes.c_float * len(some))(*[1.0 for _ in some])
        if api.llama_set_adapters_lora(self.context, adapters, len(some), scales):
            raise RuntimeError(f"llama.cpp does not take adapter {name}")

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """Greedy tokens of at most `seqs` prompts, all together."""
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        texts: list[list[int]] = [[] for _ in prompts]
        waiting = [
            (token, place, i, place == len(ids) - 1)
            for i, ids in enumerate(prompts)
            for place, token in enumerate(ids)
        ]
        for start in range(0, len(waiting), self.step_tokens):
            self._step(waiting[start : start + self.step_tokens], texts)
        for _ in range(new - 1):
            last = [
                (text[-1], len(ids) + len(text) - 1, i, True)
                for i, (ids, text) in enumerate(zip(prompts, texts, strict=True))
            ]
            self._step(last, texts)
        return texts

    def _step(self, tokens: Sequence[tuple[int, int, int, bool]], texts: list[list[int]]) -> None:
        """Compute (token, position, sequence, whether it samples); append what is sampled."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, place, sequence, samples) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, place, samples
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if api.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp could not compute a step")
        for i, (_, _, sequence, samples) in enumerate(tokens):
            if samples:
                logits = api.llama_get_logits_ith(self.context, i)
                values = np.ctypeslib.as_array(logits, (self.vocabulary,))
                texts[sequence].append(int(values.argmax()))

    def run(self, requests: Iterable[Any], new: int) -> list[list[int]]:
        """All requests' tokens, adapter by adapter."""
        groups: dict[str | None, list[tuple[int, list[int]]]] = {}
        for i, (ids, name) in enumerate(requests):
            groups.setdefault(name, []).append((i, ids))
        found: dict[int, list[int]] = {}
        for name, group in groups.items():
            self.use(name)
            for first in range(0, len(group), self.seqs):
                some = group[first : first + self.seqs]
                texts = self.generate([ids for _, ids in some], new)
                found |= {i: text for (i, _), text in zip(some, texts, strict=True)}
        return [found[i] for i in sorted(found)]


def _found(pointer: Any, what: object) -> Any:
    if not pointer:
        raise RuntimeError(f"llama.cpp could not make {what}")
    return pointer


def main() -> None:
    path = Path(sys.argv[1])
    spec = json.loads(path.read_text())
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints is no reply
    model = Model(spec, path.parent)
    first = {name: [ids, name] for ids, name in reversed(spec["requests"])}
    model.run(first.values(), 2)
    print(json.dumps({"version": api.__version__}), file=replies, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        model.run(spec["requests"], spec["new"])
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds}), file=replies, flush=True)


if __name__ == "__main__":
    main()
