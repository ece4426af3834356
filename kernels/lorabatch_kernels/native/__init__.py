"""The CPU kernels in C, compiled for this machine when they are first needed.

`library()` compiles the sources beside this file with $CC, else cc, which must be gcc 12 or newer,
about 9 seconds once a machine, and loads what came of it. They are plain C with the compiler's
vector types: no headers but the standard library's and the compiler's. OpenMP's runtime is not
linked: the one that torch has loaded is used, so that both work with one pool of threads.

Where no compiler is found, or its result does not load, `library()` is None, `problem()` says why,
and callers take torch operators, which are slower. LORABATCH_NATIVE=0 asks for that.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
HEADERS = ("vec.h", "chunk.h", "team.h")
SOURCES = ("matmul.c", "lora.c", "attention.c", "rows.c", "layer.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=gnu11")
COMPILE_TIMEOUT_S = 300

COLUMNS = 32  # as in matmul.c
MAX_PANELS, MAX_TILE = 64, 8  # as in lora.c
MAX_WIDTH, MAX_GROUP = 256, 96  # as in chunk.h

Address, Long, Float, Int = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
SIGNATURES: dict[str, list[Any]] = {
    # y, x, weight, tokens, whether bf16
    "lorabatch_matmul": [Address, Address, Address, Long, Int],
    # y, its row stride, x, its row stride, its width, sites, their number, tiles, whether bf16
    "lorabatch_add_lora": [Address, Long, Address, Long, Long, Address, Long, Address, Int],
    # attention, spans, whether bf16
    "lorabatch_attention": [Address, Address, Int],
    # out, x, weight, rows, width, epsilon, whether bf16
    "lorabatch_rms_norm": [Address, Address, Address, Long, Long, Float, Int],
    # out, x, rows, width, whether bf16
    "lorabatch_silu_gate": [Address, Address, Long, Long, Int],
    # x, its row stride, heads, cosine, sine, tokens, width, whether bf16
    "lorabatch_rotary": [Address, Long, Long, Address, Address, Long, Long, Int],
    # out, x, rows, width, whether bf16
    "lorabatch_argmax": [Address, Address, Long, Long, Int],
    # hidden, decoders, their number, step, whether bf16
    "lorabatch_decoder_layers": [Address, Address, Long, Address, Int],
}


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Weight(ctypes.Structure):
    """As in team.h, like all below that name no other file."""

    _fields_ = [*_fields(Address, "panels bias"), ("inner", Long), ("outer", Long)]


class Lora(ctypes.Structure):
    _fields_ = [
        *_fields(Address, "a b"),
        *_fields(ctypes.c_int32, "rank affine"),
        ("scale", Float),
    ]


class Site(ctypes.Structure):
    _fields_ = [("slots", Address), *_fields(Long, "out column")]


class Tiles(ctypes.Structure):
    _fields_ = [*_fields(Address, "order slot start len"), ("tiles", Long)]


class Spans(ctypes.Structure):
    _fields_ = [*_fields(Address, "start count past first"), ("spans", Long)]


class View(ctypes.Structure):
    _fields_ = [("data", Address), *_fields(Long, "head token")]


class Attention(ctypes.Structure):
    _fields_ = [
        *_fields(View, "query key value"),
        *_fields(Address, "keys values index out sinks"),
        *_fields(Long, "tokens heads kv_heads width value_width positions window"),
        *_fields(Float, "scale softcap"),
    ]


class Product(ctypes.Structure):
    """As in layer.c."""

    _fields_ = [("weight", Weight), ("sites", Address), ("count", Long)]


class Decoder(ctypes.Structure):
    """As in layer.c."""

    _fields_ = [
        *_fields(Product, "qkv o gate_up down"),
        *_fields(Address, "first_norm second_norm keys values"),
        *_fields(Long, "heads kv_heads width positions window"),
        *_fields(Float, "scale first_epsilon second_epsilon"),
    ]


class Step(ctypes.Structure):
    """As in layer.c."""

    _fields_ = [
        *_fields(Address, "x qkv attended gate_up gated y cosine sine index spans tiles seconds"),
        *_fields(Address, "kept kept_hidden kept_tiles"),
        *_fields(Long, "tokens kept_count"),
    ]


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there are none."""
    return _loaded()[0]


def problem() -> str | None:
    """Why there are no compiled kernels; None where there are."""
    return _loaded()[1]


def supports(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16)


def is_half(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16


@cache
def has(feature: str) -> bool:
    """Whether this processor says that it has it."""
    return feature in _processor().split()


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("LORABATCH_NATIVE", "1") == "0":
        return None, "LORABATCH_NATIVE is 0"
    try:
        made = ctypes.CDLL(str(_compiled()))
        for name, arguments in SIGNATURES.items():
            function = getattr(made, name)
            function.argtypes, function.restype = arguments, None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        said = next((line for line in lines if "error:" in line), lines[-1])
        return None, f"the C compiler failed: {said}"
    except (OSError, AttributeError, ValueError, RuntimeError) as error:
        return None, str(error)
    except subprocess.TimeoutExpired:
        return None, f"the C compiler took more than {COMPILE_TIMEOUT_S} s"
    return made, None


def _compiled() -> Path:
    """The shared library for these sources, this compiler and this processor."""
    wanted = shlex.split(os.environ.get("CC") or "cc") or ["cc"]
    compiler = shutil.which(wanted[0])
    if compiler is None:
        raise OSError(f"no C compiler {wanted[0]!r} on PATH: install gcc, or set CC")
    command = [compiler, *wanted[1:]]
    sources = [HERE / name for name in SOURCES]
    digest = hashlib.sha256()
    for path in (*(HERE / name for name in HEADERS), *sources):
        digest.update(path.read_bytes())
    program = os.stat(compiler)
    version = (program.st_size, program.st_mtime_ns)  # of the file behind a link
    digest.update(repr((command, version, FLAGS, platform.machine(), _processor())).encode())
    target = _cache_folder() / f"cpu-{digest.hexdigest()[:16]}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            objects = [str(Path(scratch) / f"{path.stem}.o") for path in sources]
            for path, made in zip(sources, objects, strict=True):
                _run([*command, *FLAGS, "-c", str(path), "-o", made])
            # Linked without -fopenmp: the runtime comes from the process, see above.
            together = str(Path(scratch) / "all.so")
            _run([*command, "-shared", "-o", together, *objects, "-lm"])
            os.replace(together, target)  # at once, whoever else compiles the same
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "lorabatch"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kinds = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))
