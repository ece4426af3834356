"""Bad adapter_model.safetensors: the file, and tensors that do not fit."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorabatch.errors import InvalidAdapter, UnsupportedAdapter
from tests.bad_adapters.good import (
    NARROW,
    PREFIX,
    RANK,
    WEIGHTS,
    WIDTH,
    Q,
    V,
    good_tensors,
    key,
    write,
)
from tests.bad_adapters.making import Bad, with_config, with_file, with_tensors


def _bin_only(folder: Path) -> None:
    write(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _truncated(folder: Path) -> None:
    write(folder)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


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


WEIGHTS_ROWS: list[Bad] = [
    Bad("no tensors file", with_file(WEIGHTS, None), InvalidAdapter, (WEIGHTS, "missing")),
    Bad(
        "pickle only",
        _bin_only,
        InvalidAdapter,
        (WEIGHTS, "missing", "adapter_model.bin", "convert"),
    ),
    Bad(
        "empty file", with_file(WEIGHTS, b""), InvalidAdapter, (WEIGHTS, "not a valid safetensors")
    ),
    Bad(
        "garbage",
        with_file(WEIGHTS, b"\x80\x04pickle" * 9),
        InvalidAdapter,
        ("not a valid safetensors",),
    ),
    Bad("truncated", _truncated, InvalidAdapter, ("not a valid safetensors",)),
    Bad(
        "header of 2^63 bytes",
        with_file(WEIGHTS, struct.pack("<Q", 1 << 63) + b"{}"),
        InvalidAdapter,
        ("not a valid safetensors",),
    ),
    Bad(
        "overlapping data",
        with_file(WEIGHTS, _overlapping()),
        InvalidAdapter,
        ("not a valid safetensors",),
    ),
    Bad(
        "a key twice in the header",
        with_file(WEIGHTS, _same_key_twice()),
        InvalidAdapter,
        (WEIGHTS, "safetensors"),
    ),
    Bad("no tensors inside", with_file(WEIGHTS, _header({}, b"")), InvalidAdapter, ("no tensors",)),
    Bad(
        "one tensor under two names",
        with_tensors({f"{PREFIX}{Q}.lora_A.default.weight": torch.zeros(RANK, WIDTH)}),
        InvalidAdapter,
        (Q, "twice"),
    ),
    Bad(
        "A without B",
        with_tensors({}, (key(Q, "B"),)),
        InvalidAdapter,
        (Q, "lora_A without lora_B"),
    ),
    Bad(
        "B without A",
        with_tensors({}, (key(V, "A"),)),
        InvalidAdapter,
        (V, "lora_B without lora_A"),
    ),
    Bad(
        "wrong width",
        with_tensors({key(Q, "A"): torch.zeros(RANK, WIDTH - 1)}),
        InvalidAdapter,
        (key(Q, "A"), "[4, 31]", "[4, 32]"),
    ),
    Bad(
        "A transposed",
        with_tensors({key(Q, "A"): torch.zeros(WIDTH, RANK)}),
        InvalidAdapter,
        ("[32, 4]",),
    ),
    Bad(
        "one dimension", with_tensors({key(Q, "A"): torch.zeros(RANK)}), InvalidAdapter, ("is [4]",)
    ),
    Bad(
        "rank of the config differs", with_config(r=5), InvalidAdapter, ("wanted [5, 32]", "rank 5")
    ),
    Bad(
        "rank of the pattern differs",
        with_config(rank_pattern={"v_proj": 2}),
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
        with_tensors({key(Q, "A"): _filled(math.nan)}),
        InvalidAdapter,
        (key(Q, "A"), "NaN or infinite"),
    ),
    Bad(
        "Inf", with_tensors({key(Q, "A"): _filled(math.inf)}), InvalidAdapter, ("NaN or infinite",)
    ),
    Bad(
        "too large for the engine's dtype",
        with_tensors({key(Q, "A"): _filled(1e300, torch.float64)}),
        InvalidAdapter,
        ("NaN or infinite", "float32"),
    ),
    Bad(
        "whole numbers",
        with_tensors({key(Q, "A"): torch.zeros(RANK, WIDTH, dtype=torch.int8)}),
        InvalidAdapter,
        ("dtype I8", "BF16"),
    ),
    Bad(
        "8-bit floats",
        with_tensors({key(Q, "A"): torch.zeros(RANK, WIDTH).to(torch.float8_e4m3fn)}),
        InvalidAdapter,
        ("F8_E4M3", "BF16"),
    ),
    Bad(
        "unknown key",
        with_tensors({"extra.weight": torch.zeros(2)}),
        UnsupportedAdapter,
        ("extra.weight",),
    ),
    Bad(
        "DoRA's magnitudes",
        with_tensors({f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(WIDTH)}),
        InvalidAdapter,
        (Q, "lora_magnitude_vector beside lora_A and lora_B", "use_dora False"),
    ),
    Bad(
        "magnitudes of another layer",
        with_tensors(
            {f"{PREFIX}{m}.lora_magnitude_vector": torch.ones(WIDTH) for m in (Q, V)},
            use_dora=True,
        ),
        InvalidAdapter,
        (V, "lora_magnitude_vector is [32], wanted [16]"),
    ),
    Bad(
        "magnitudes that are not finite",
        with_tensors(
            {
                f"{PREFIX}{Q}.lora_magnitude_vector": torch.full((WIDTH,), math.inf),
                f"{PREFIX}{V}.lora_magnitude_vector": torch.ones(NARROW),
            },
            use_dora=True,
        ),
        InvalidAdapter,
        (Q, "NaN or infinite"),
    ),
    Bad(
        "a bias that no setting speaks of",
        with_tensors({f"{PREFIX}{Q}.base_layer.bias": torch.ones(WIDTH)}),
        InvalidAdapter,
        (Q, "bias beside lora_A and lora_B", "bias 'none'"),
    ),
    Bad(
        "a bias where the base has none",
        with_tensors({f"{PREFIX}{Q}.base_layer.bias": torch.ones(WIDTH)}, bias="all"),
        InvalidAdapter,
        (f"{Q}.base_layer.bias", "has no bias"),
    ),
    Bad(
        "a saved module",
        with_tensors({f"{PREFIX}model.norm.weight": torch.ones(WIDTH)}),
        UnsupportedAdapter,
        ("model.norm.weight",),
    ),
    Bad(
        "another model's layers",
        with_tensors({key("transformer.h.0.attn.c_attn", p): torch.ones(4, 4) for p in "AB"}),
        InvalidAdapter,
        ("no such layer", "transformer.h.0.attn.c_attn", "another base model?"),
    ),
    Bad(
        "more layers than the model has",
        with_tensors(
            {key(f"model.layers.{i}.self_attn.q_proj", "A"): torch.ones(4, 4) for i in range(9)}
        ),
        InvalidAdapter,
        ("no such layer", "more"),
    ),
]
