"""Adapters that must be refused: what is wrong, how to make one, the error and words in it.

All are made from one good adapter (`write`) for the layers in TARGET.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorabatch import errors
from lorabatch.errors import InvalidAdapter, UnsupportedAdapter
from lorabatch_worker.adapters.weights import AdapterTarget

WIDTH, NARROW, RANK = 32, 16, 4
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
PREFIX = "base_model.model."
TARGET = AdapterTarget(
    base_names=frozenset({"acme/tiny"}),
    shapes={Q: (WIDTH, WIDTH), V: (WIDTH, NARROW)},
    modules=frozenset({Q, V, "lm_head", "model.embed_tokens", "model.norm"}),
    max_rank=8,
    dtype=torch.float32,
)
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "acme/tiny",
    "r": RANK,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "init_lora_weights": True,
}


class Bad(NamedTuple):
    what: str
    make: Callable[[Path], None]
    error: type[errors.LoraBatchError]
    words: tuple[str, ...]


def key(module: str, part: str) -> str:
    return f"{PREFIX}{module}.lora_{part}.weight"


def good_tensors(rank: int = RANK) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, (fan_in, fan_out) in TARGET.shapes.items():
        tensors[key(module, "A")] = torch.randn(rank, fan_in, generator=generator)
        tensors[key(module, "B")] = torch.randn(fan_out, rank, generator=generator)
    return tensors


def write(
    folder: Path,
    config: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    without: tuple[str, ...] = (),
) -> None:
    """A good adapter with `config` and `tensors` on top and the keys in `without` left out."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {k: v for k, v in {**CONFIG, **(config or {})}.items() if k not in without}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    kept = {k: t for k, t in {**good_tensors(), **(tensors or {})}.items() if k not in without}
    save_file(kept, folder / "adapter_model.safetensors")


def _config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: write(folder, fields)


def _tensors(tensors: dict[str, Tensor], without: tuple[str, ...] = ()) -> Callable[[Path], None]:
    return lambda folder: write(folder, None, tensors, without)


def _file(name: str, content: bytes | str | None) -> Callable[[Path], None]:
    """A good adapter with one file replaced, or removed for None."""

    def make(folder: Path) -> None:
        write(folder)
        data = content.encode() if isinstance(content, str) else content
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)

    return make


def _bin_only(folder: Path) -> None:
    write(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _truncated(folder: Path) -> None:
    write(folder)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _config_is_a_folder(folder: Path) -> None:
    write(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").mkdir()


def _header(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _overlapping() -> bytes:
    size = RANK * WIDTH * 4
    entry = {"dtype": "F32", "shape": [RANK, WIDTH]}
    a, b = ({**entry, "data_offsets": [s, s + size]} for s in (0, size // 2))
    return _header({key(Q, "A"): a, key(V, "A"): b}, bytes(size + size // 2))


def _same_key_twice() -> bytes:
    size = RANK * WIDTH * 4
    entry = {"dtype": "F32", "shape": [RANK, WIDTH], "data_offsets": [0, size]}
    other = {**entry, "data_offsets": [size, 2 * size]}
    name = json.dumps(key(Q, "A"))
    text = f"{{{name}: {json.dumps(entry)}, {name}: {json.dumps(other)}}}".encode()
    return struct.pack("<Q", len(text)) + text + bytes(2 * size)


def _filled(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    tensor = torch.zeros(RANK, WIDTH, dtype=dtype)
    tensor[1, 2] = value
    return tensor


WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
SLOW = {"a": "(a+)+b", "?": ".?" * 60 + "X", "|": "(.|.)" * 33 + "X", "#": "(?x:(.+)#\n+X)"}

BAD: list[Bad] = [
    # -- adapter_config.json as a file
    Bad("no config", _file(SETTINGS, None), InvalidAdapter, ("adapter_config.json", "missing")),
    Bad(
        "config of 1 MiB and more",
        _file(SETTINGS, " " * (1 << 20) + "{}"),
        InvalidAdapter,
        ("over", "bytes"),
    ),
    Bad("config that is no JSON", _file(SETTINGS, "{'r': 4}"), InvalidAdapter, ("not valid JSON",)),
    Bad(
        "config cut off",
        _file(SETTINGS, '{"peft_type": "LORA", "r"'),
        InvalidAdapter,
        ("not valid JSON",),
    ),
    Bad("config not UTF-8", _file(SETTINGS, b'{"r": "\xff"}'), InvalidAdapter, ("not valid JSON",)),
    Bad(
        "config nested too deep",
        _file(SETTINGS, "[" * 200_000),
        InvalidAdapter,
        ("not valid JSON",),
    ),
    Bad(
        "config number too long",
        _file(SETTINGS, '{"r": ' + "9" * 9000 + "}"),
        InvalidAdapter,
        ("not valid",),
    ),
    Bad("config is a list", _file(SETTINGS, "[1]"), InvalidAdapter, ("wanted an object", "list")),
    Bad("config is a folder", _config_is_a_folder, InvalidAdapter, ("adapter_config.json",)),
    # -- fields
    Bad(
        "no peft_type",
        lambda f: write(f, without=("peft_type",)),
        UnsupportedAdapter,
        ("peft_type", "'LORA'"),
    ),
    Bad(
        "another method",
        _config(peft_type="LOHA"),
        UnsupportedAdapter,
        ("peft_type", "'LOHA'", "'LORA'"),
    ),
    Bad("DoRA", _config(use_dora=True), UnsupportedAdapter, ("use_dora", "True")),
    Bad("bias", _config(bias="all"), UnsupportedAdapter, ("bias", "'all'")),
    Bad("lora_bias", _config(lora_bias=True), UnsupportedAdapter, ("lora_bias",)),
    Bad(
        "modules_to_save",
        _config(modules_to_save=["lm_head"]),
        UnsupportedAdapter,
        ("modules_to_save", "wanted it off"),
    ),
    Bad(
        "token rows",
        _config(trainable_token_indices=[5]),
        UnsupportedAdapter,
        ("trainable_token_indices", "off"),
    ),
    Bad(
        "3-D parameters",
        _config(target_parameters=["experts.up"]),
        UnsupportedAdapter,
        ("target_parameters",),
    ),
    Bad(
        "replicated layers",
        _config(layer_replication=[[0, 2]]),
        UnsupportedAdapter,
        ("layer_replication",),
    ),
    Bad(
        "aLoRA",
        _config(alora_invocation_tokens=[3, 4]),
        UnsupportedAdapter,
        ("alora_invocation_tokens",),
    ),
    Bad("QALoRA", _config(use_qalora=True), UnsupportedAdapter, ("use_qalora",)),
    Bad(
        "PiSSA",
        _config(init_lora_weights="pissa_niter_16"),
        UnsupportedAdapter,
        ("pissa_niter_16", "convert"),
    ),
    Bad("OLoRA", _config(init_lora_weights="olora"), UnsupportedAdapter, ("olora", "convert")),
    Bad("LoftQ", _config(init_lora_weights="loftq"), UnsupportedAdapter, ("loftq", "convert")),
    Bad("CorDA", _config(init_lora_weights="corda"), UnsupportedAdapter, ("corda", "convert")),
    Bad(
        "unknown init",
        _config(init_lora_weights="magic"),
        UnsupportedAdapter,
        ("init_lora_weights", "'magic'"),
    ),
    Bad(
        "init that is a list",
        _config(init_lora_weights=[]),
        UnsupportedAdapter,
        ("init_lora_weights",),
    ),
    Bad(
        "unknown field that is on",
        _config(use_hyper=True),
        UnsupportedAdapter,
        ("use_hyper", "True", "off"),
    ),
    Bad("rsLoRA that is no bool", _config(use_rslora="no"), InvalidAdapter, ("use_rslora", "'no'")),
    Bad(
        "no rank",
        lambda f: write(f, without=("r",)),
        InvalidAdapter,
        ("r is None", "positive whole number"),
    ),
    Bad("rank 0", _config(r=0), InvalidAdapter, ("r is 0", "positive whole number")),
    Bad("rank true", _config(r=True), InvalidAdapter, ("r is True",)),
    Bad("rank as text", _config(r="4"), InvalidAdapter, ("r is '4'",)),
    Bad("rank 4.0", _config(r=4.0), InvalidAdapter, ("r is 4.0", "whole")),
    Bad("alpha 0", _config(lora_alpha=0), InvalidAdapter, ("lora_alpha is 0", "positive number")),
    Bad("alpha NaN", _config(lora_alpha=math.nan), InvalidAdapter, ("lora_alpha is nan",)),
    Bad("alpha infinite", _config(lora_alpha=math.inf), InvalidAdapter, ("lora_alpha is inf",)),
    Bad("alpha beyond fp32", _config(lora_alpha=1e300), InvalidAdapter, ("lora_alpha is 1e+300",)),
    Bad("alpha beyond fp64", _config(lora_alpha=10**400), InvalidAdapter, ("lora_alpha is 1000",)),
    Bad(
        "base is a number",
        _config(base_model_name_or_path=7),
        InvalidAdapter,
        ("base_model_name_or_path",),
    ),
    Bad(
        "another base model",
        _config(base_model_name_or_path="acme/huge"),
        InvalidAdapter,
        ("'acme/huge'", "'acme/tiny'", "LORABATCH_BASE_MODEL_ALIASES"),
    ),
    # -- patterns
    Bad(
        "pattern is a list",
        _config(rank_pattern=["q_proj"]),
        InvalidAdapter,
        ("rank_pattern", "an object"),
    ),
    Bad(
        "rank pattern 0",
        _config(rank_pattern={"q_proj": 0}),
        InvalidAdapter,
        ("rank_pattern", "q_proj"),
    ),
    Bad(
        "alpha pattern text",
        _config(alpha_pattern={"q": "8"}),
        InvalidAdapter,
        ("alpha_pattern", "'8'"),
    ),
    Bad(
        "broken pattern",
        _config(rank_pattern={"q[": 4}),
        InvalidAdapter,
        ("'q['", "regular expression"),
    ),
    Bad(
        "global flag",
        _config(rank_pattern={"(?i)Q_PROJ": 4}),
        UnsupportedAdapter,
        ("rank_pattern", "(?i)"),
    ),
    *(
        Bad(
            f"slow pattern {p[:12]!r}",
            _config(rank_pattern={p: 4}),
            UnsupportedAdapter,
            ("rank_pattern", "involved"),
        )
        for p in SLOW.values()
    ),
    *(
        Bad(
            f"slow alpha {p[:12]!r}",
            _config(alpha_pattern={p: 4}),
            UnsupportedAdapter,
            ("alpha_pattern", "involved"),
        )
        for p in SLOW.values()
    ),
    Bad(
        "hundreds of patterns",
        _config(rank_pattern={f".*.*{i}X": 4 for i in range(300)}),
        UnsupportedAdapter,
        ("rank_pattern", "patterns"),
    ),
    # -- the tensors
    Bad("no tensors file", _file(WEIGHTS, None), InvalidAdapter, (WEIGHTS, "missing")),
    Bad(
        "pickle only",
        _bin_only,
        InvalidAdapter,
        (WEIGHTS, "missing", "adapter_model.bin", "convert"),
    ),
    Bad("empty file", _file(WEIGHTS, b""), InvalidAdapter, (WEIGHTS, "not a valid safetensors")),
    Bad(
        "garbage",
        _file(WEIGHTS, b"\x80\x04pickle" * 9),
        InvalidAdapter,
        ("not a valid safetensors",),
    ),
    Bad("truncated", _truncated, InvalidAdapter, ("not a valid safetensors",)),
    Bad(
        "header of 2^63 bytes",
        _file(WEIGHTS, struct.pack("<Q", 1 << 63) + b"{}"),
        InvalidAdapter,
        ("not a valid safetensors",),
    ),
    Bad(
        "overlapping data",
        _file(WEIGHTS, _overlapping()),
        InvalidAdapter,
        ("not a valid safetensors",),
    ),
    Bad(
        "a key twice in the header",
        _file(WEIGHTS, _same_key_twice()),
        InvalidAdapter,
        (WEIGHTS, "safetensors"),
    ),
    Bad("no tensors inside", _file(WEIGHTS, _header({}, b"")), InvalidAdapter, ("no tensors",)),
    Bad(
        "one tensor under two names",
        _tensors({f"{PREFIX}{Q}.lora_A.default.weight": torch.zeros(RANK, WIDTH)}),
        InvalidAdapter,
        (Q, "twice"),
    ),
    Bad("A without B", _tensors({}, (key(Q, "B"),)), InvalidAdapter, (Q, "lora_A without lora_B")),
    Bad("B without A", _tensors({}, (key(V, "A"),)), InvalidAdapter, (V, "lora_B without lora_A")),
    Bad(
        "wrong width",
        _tensors({key(Q, "A"): torch.zeros(RANK, WIDTH - 1)}),
        InvalidAdapter,
        (key(Q, "A"), "[4, 31]", "[4, 32]"),
    ),
    Bad(
        "A transposed",
        _tensors({key(Q, "A"): torch.zeros(WIDTH, RANK)}),
        InvalidAdapter,
        ("[32, 4]",),
    ),
    Bad("one dimension", _tensors({key(Q, "A"): torch.zeros(RANK)}), InvalidAdapter, ("is [4]",)),
    Bad("rank of the config differs", _config(r=5), InvalidAdapter, ("wanted [5, 32]", "rank 5")),
    Bad(
        "rank of the pattern differs",
        _config(rank_pattern={"v_proj": 2}),
        InvalidAdapter,
        (V, "rank 2 of the config"),
    ),
    Bad(
        "rank over the limit",
        lambda f: write(f, {"r": 9}, good_tensors(9)),
        InvalidAdapter,
        ("rank 9", "allowed 8", "LORABATCH_MAX_ADAPTER_RANK"),
    ),
    Bad(
        "NaN",
        _tensors({key(Q, "A"): _filled(math.nan)}),
        InvalidAdapter,
        (key(Q, "A"), "NaN or infinite"),
    ),
    Bad("Inf", _tensors({key(Q, "A"): _filled(math.inf)}), InvalidAdapter, ("NaN or infinite",)),
    Bad(
        "too large for the engine's dtype",
        _tensors({key(Q, "A"): _filled(1e300, torch.float64)}),
        InvalidAdapter,
        ("NaN or infinite", "float32"),
    ),
    Bad(
        "whole numbers",
        _tensors({key(Q, "A"): torch.zeros(RANK, WIDTH, dtype=torch.int8)}),
        InvalidAdapter,
        ("dtype I8", "BF16"),
    ),
    Bad(
        "8-bit floats",
        _tensors({key(Q, "A"): torch.zeros(RANK, WIDTH).to(torch.float8_e4m3fn)}),
        InvalidAdapter,
        ("F8_E4M3", "BF16"),
    ),
    Bad(
        "unknown key",
        _tensors({"extra.weight": torch.zeros(2)}),
        UnsupportedAdapter,
        ("extra.weight",),
    ),
    Bad(
        "DoRA's magnitudes",
        _tensors({f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(WIDTH)}),
        UnsupportedAdapter,
        ("lora_magnitude_vector",),
    ),
    Bad(
        "a saved module",
        _tensors({f"{PREFIX}model.norm.weight": torch.ones(WIDTH)}),
        UnsupportedAdapter,
        ("model.norm.weight",),
    ),
    Bad(
        "trained token rows",
        _tensors(
            {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2)}
        ),
        UnsupportedAdapter,
        ("trainable_tokens_delta",),
    ),
    Bad(
        "LoRA on the embeddings",
        _tensors({f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(4, 9)}),
        UnsupportedAdapter,
        ("lora_embedding_A",),
    ),
    Bad(
        "LoRA on the output head",
        _tensors({key("lm_head", "A"): torch.ones(4, 32), key("lm_head", "B"): torch.ones(9, 4)}),
        UnsupportedAdapter,
        ("lm_head", "output head"),
    ),
    Bad(
        "another model's layers",
        _tensors({key("transformer.h.0.attn.c_attn", p): torch.ones(4, 4) for p in "AB"}),
        InvalidAdapter,
        ("no such layer", "transformer.h.0.attn.c_attn", "another base model?"),
    ),
    Bad(
        "more layers than the model has",
        _tensors(
            {key(f"model.layers.{i}.self_attn.q_proj", "A"): torch.ones(4, 4) for i in range(9)}
        ),
        InvalidAdapter,
        ("no such layer", "more"),
    ),
    # -- chat templates
    Bad(
        "chat template is an object",
        _file("tokenizer_config.json", '{"chat_template": {"a": 1}}'),
        UnsupportedAdapter,
        ("chat_template", "one string"),
    ),
    Bad(
        "chat template is a list",
        _file("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
        UnsupportedAdapter,
        ("chat_template", "one string"),
    ),
    Bad(
        "tokenizer config is a list",
        _file("tokenizer_config.json", "[]"),
        InvalidAdapter,
        ("JSON object",),
    ),
    Bad(
        "tokenizer config broken",
        _file("tokenizer_config.json", "{"),
        InvalidAdapter,
        ("JSON object",),
    ),
    Bad(
        "tokenizer config deep",
        _file("tokenizer_config.json", "[" * 200_000),
        InvalidAdapter,
        ("JSON object",),
    ),
    Bad(
        "template over 256 KiB",
        _file("chat_template.jinja", "x" * (1 << 19)),
        InvalidAdapter,
        ("over", "bytes"),
    ),
    Bad(
        "template not UTF-8",
        _file("chat_template.jinja", b"\xff\xfe"),
        InvalidAdapter,
        ("chat_template.jinja",),
    ),
]
