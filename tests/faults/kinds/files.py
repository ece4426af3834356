"""Bulk files with bad lines, whose submission is killed and begun again."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from lorabatch_producer.bulk import GoodLine, read_lines
from lorabatch_producer.output import errors_path
from tests.faults.batch import Batch
from tests.faults.observed import Fault, Observed
from tests.faults.producer import KILLED, Played
from tests.faults.shop import Shop

__all__ = ["submitted"]

BOM = b"\xef\xbb\xbf"
LONG_BYTES = 10 << 20
BAD_SHARE = 100
TENANT = "tenant-1"
GROUPS = 5
RUN_S = 0.8


@dataclass
class _File:
    """`bad`: the code of each bad line, by its number. `ids`: custom_ids of the good ones."""

    path: Path
    bad: dict[int, str] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)


def submitted(boundary: str = "") -> Fault:
    """Killed at the boundary, in one of the file's groups of lines; or at a random moment."""

    def submit(shop: Shop, rng: random.Random, count: int) -> Observed:
        shop.crew.ready(2)
        file = _write(shop.home / f"in-{rng.randrange(10**9)}.jsonl", rng, count)
        chunk = str(max(1, count // GROUPS))
        command = ("batch", "submit", str(file.path), "--tenant", TENANT)
        trap = {"FAULT_KILL": f"{boundary} {rng.randint(1, GROUPS)}"} if boundary else {}
        killed = Played({**shop.crew.env, "FAULT_CHUNK": chunk, **trap}, *command).go()
        if not boundary:
            time.sleep(rng.uniform(0.0, RUN_S))
            killed.kill()
        killed.end()
        out = file.path.with_suffix(".out.jsonl")
        again = Played(shop.crew.env, *command, "--output", str(out)).go()
        said = again.end()
        batch_id = said.split()[1] if said.startswith("batch ") else ""
        wrong = _said(file, said, again.code)
        with file.path.open("rb") as lines:
            read = list(read_lines(lines, batch_id, TENANT, frozenset())) if batch_id else []
        batch = Batch({line.job.job_id: line.job for line in read if isinstance(line, GoodLine)})
        shop.note(list(batch.jobs.values()))
        wrong += _counted(shop, batch, batch_id, file)
        wrong += _written(file, out) if out.exists() else [f"no output: {said}"]
        file.path.unlink()
        return Observed(batch, hit=killed.code == KILLED, wrong=lambda: wrong)

    return submit


def _write(path: Path, rng: random.Random, count: int) -> _File:
    """`count` good lines and 1% bad ones, at least one of each kind; the last line is cut."""
    file = _File(path)
    kinds = ["nul", "not_utf8", "line_too_long", "duplicate_custom_id"]
    kinds += rng.choices(["nul", "not_utf8", "duplicate_custom_id"], k=count // BAD_SHARE)
    order = ["", *rng.sample(["good"] * (count - 1) + kinds, k=count - 1 + len(kinds))]
    lines: list[bytes] = []
    for number, kind in enumerate(order, start=1):
        custom_id = f"line-{number}"
        if kind == "duplicate_custom_id":
            custom_id = rng.choice(file.ids)
        lines.append(_line(kind, custom_id, rng))
        if kind in kinds:
            file.bad[number] = kind
        else:
            file.ids.append(custom_id)
    file.bad[len(order) + 1] = "not_json"
    path.write_bytes(BOM + b"\n".join(lines) + b"\n" + _line("", "cut", rng)[:30])
    return file


def _line(kind: str, custom_id: str, rng: random.Random) -> bytes:
    sampling = {"max_new_tokens": rng.randint(5, 20)}
    fields = {"custom_id": custom_id, "adapter_id": f"adapter-{rng.randrange(5)}", **sampling}
    raw = json.dumps({**fields, "prompt": f"tell me of {custom_id}"}).encode()
    if kind == "nul":
        return raw.replace(b"tell", b"te\x00l")
    if kind == "not_utf8":
        return raw.replace(b"tell", b"te\xffl")
    if kind == "line_too_long":
        return raw.replace(b"tell", b"t" * LONG_BYTES)
    return raw


def _said(file: _File, words: str, code: int) -> list[str]:
    """Bad lines are counted and make the exit code 1."""
    wanted = f"{len(file.ids)} lines accepted, {len(file.bad)} bad"
    fine = wanted in words and code == 1
    return [] if fine else [f"wanted {wanted!r}, it said {words!r} and {code}"]


def _counted(shop: Shop, batch: Batch, batch_id: str, file: _File) -> list[str]:
    """The ledger has the good lines of the file and nothing else."""
    counts = shop.ledger.counts(batch_id)
    good = [job.custom_id for job in batch.jobs.values()]
    if counts == {"succeeded": len(file.ids)} and good == file.ids:
        return []
    return [f"{len(file.ids)} lines are good, {len(good)} were read, the ledger has {counts}"]


def _written(file: _File, out: Path) -> list[str]:
    """A line for each good line, in order; a line for each bad one with its number and why."""
    with out.open() as lines:
        ids = [json.loads(line)["custom_id"] for line in lines]
    with errors_path(out).open() as lines:
        bad = {found["line"]: found["code"] for found in map(json.loads, lines)}
    wrong = [] if ids == file.ids else [f"{len(ids)} lines of output for {len(file.ids)} good ones"]
    out.unlink()
    errors_path(out).unlink()
    return wrong if bad == file.bad else [*wrong, f"bad lines {bad}, wanted {file.bad}"]
