"""What structured outputs cost, and whether all of them are what was asked for.

    python -m bench.structured [--jobs 200] [--adapters 8] [--repeats 3] [--dtype auto]

Chat prompts over mixed adapters and the base model, each job with a schema, a quarter of them
sampled. Turns alternate in one engine: with grammars, and without them for exactly as many tokens
of each job. Grammars are new in each turn, so that compiling them is part of it; first a turn warms
up. `of_free` is seconds without grammars / seconds with them: 1 is free. `valid` is the share of
texts that json.loads reads and jsonschema accepts, over all turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import threading
import time
import warnings
from collections.abc import Sequence
from typing import Any

import jsonschema

from bench.ours import HOME
from bench.record import record
from bench.throughput import PAUSE_S
from bench.workload import KINDS, NOUNS, write_adapters
from lorabatch import Job, Settings
from lorabatch.ledger import Claim, Outcome
from lorabatch.settings import DEFAULT_BASE_MODEL
from lorabatch_worker.build import build_engine
from lorabatch_worker.bundled import bundled_checkpoint
from lorabatch_worker.engine import Engine
from lorabatch_worker.threads import cores

WAIT_S = 3600
MOST_TOKENS = 256
WORD = {"type": "string", "maxLength": 24}
COUNT = {"type": "integer", "minimum": 0, "maximum": 10_000}
FIELDS: dict[str, dict[str, Any]] = {
    "title": WORD,
    "count": COUNT,
    "kind": {"enum": KINDS},
    "open": {"type": "boolean"},
    "day": {"type": "string", "pattern": r"^20[0-9]{2}-(0[1-9]|1[0-2])-[0-2][0-9]$"},
    "tags": {"type": "array", "items": {"enum": NOUNS}, "minItems": 1, "maxItems": 3},
    "place": {
        "type": "object",
        "properties": {"town": WORD, "rooms": COUNT},
        "required": ["town", "rooms"],
        "additionalProperties": False,
    },
    "price": {"anyOf": [{"type": "number", "minimum": 0, "maximum": 99}, {"type": "null"}]},
}
SCHEMAS = [
    {
        "type": "object",
        "properties": {name: FIELDS[name] for name in names},
        "required": list(names),
        "additionalProperties": False,
    }
    for names in itertools.combinations(FIELDS, 3)
]


class Asked:
    """Runs jobs on one engine: their outcomes, and how many seconds all took."""

    def __init__(self, engine: Engine) -> None:
        self._outcomes: list[Outcome] = []
        self._wanted = 0
        self._done = threading.Event()
        self.engine = engine
        engine.start(lambda ids: None, self._finished)

    def run(self, jobs: Sequence[Job]) -> tuple[list[Outcome], float]:
        self._outcomes, self._wanted = [], len(jobs)
        self._done.clear()
        started = time.perf_counter()
        self.engine.submit([Claim(job, 1, 1, 0, 0) for job in jobs])
        if not self._done.wait(WAIT_S):
            raise TimeoutError(str(self.engine.load))
        return self._outcomes, time.perf_counter() - started

    def _finished(self, some: Sequence[Outcome]) -> None:
        self._outcomes.extend(some)
        if len(self._outcomes) == self._wanted:
            self._done.set()


def job_of(number: int, adapters: Sequence[str], **params: Any) -> Job:
    """The number decides the prompt, the adapter and whether it is sampled."""
    noun, kind = NOUNS[number % len(NOUNS)], KINDS[number // 3 % len(KINDS)]
    text = f"Describe a {kind} {noun} (number {number}) as JSON with the fields I named."
    names = [None, *adapters]
    if number % 4 == 3:
        params |= {"temperature": 0.8, "seed": number}
    return Job(
        job_id=str(number),
        adapter_id=names[number % len(names)],
        messages=[{"role": "user", "content": text}],  # type: ignore[arg-type]
        sampling_params=params,  # type: ignore[arg-type]
    )


def with_grammars(count: int, turn: int, adapters: Sequence[str]) -> list[Job]:
    jobs = []
    for number in range(count):
        schema = {"title": f"turn {turn}", **SCHEMAS[number % len(SCHEMAS)]}
        wanted = {"max_new_tokens": MOST_TOKENS, "structured_outputs": {"json": schema}}
        jobs.append(job_of(number, adapters, **wanted))
    return jobs


def is_valid(outcome: Outcome) -> bool:
    schema = SCHEMAS[int(outcome.claim.job.job_id) % len(SCHEMAS)]
    try:
        jsonschema.validate(json.loads(outcome.result.text or ""), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def measure(args: argparse.Namespace, asked: Asked, adapters: Sequence[str]) -> None:
    seconds: dict[str, list[float]] = {"grammars": [], "free": []}
    tokens: list[int] = []
    outcomes: list[Outcome] = []
    asked.run(with_grammars(args.jobs, 0, adapters)[: args.max_seqs])
    for turn in range(1, args.repeats + 1):
        time.sleep(PAUSE_S)
        made, took_s = asked.run(with_grammars(args.jobs, turn, adapters))
        lengths = {o.claim.job.job_id: len(o.result.token_ids) for o in made}
        free = [
            job_of(number, adapters, max_new_tokens=lengths[str(number)], ignore_eos=True)
            for number in range(args.jobs)
        ]
        time.sleep(PAUSE_S)
        plain, free_s = asked.run(free)
        assert [len(o.result.token_ids) for o in plain if o.result.state != "succeeded"] == []
        seconds["grammars"].append(took_s)
        seconds["free"].append(free_s)
        tokens.append(sum(lengths.values()))
        outcomes += made
    pairs = zip(seconds["free"], seconds["grammars"], strict=True)
    record(
        "structured",
        jobs=args.jobs,
        adapters=len(adapters),
        schemas=len(SCHEMAS),
        dtype=asked.engine.base.description["dtype"],
        threads=asked.engine.threads,
        max_seqs=args.max_seqs,
        repeats=args.repeats,
        output_tokens=tokens,
        valid=sum(map(is_valid, outcomes)) / len(outcomes),
        ended={
            r: sum(o.result.finish_reason == r for o in outcomes) for r in ("eos_token", "length")
        },
        seconds={name: [round(s, 2) for s in some] for name, some in seconds.items()},
        tokens_per_s={
            name: round(statistics.median(t / s for t, s in zip(tokens, some, strict=True)), 1)
            for name, some in seconds.items()
        },
        of_free=round(statistics.median(free / ours for free, ours in pairs), 3),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--max-seqs", type=int, default=32)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(bundled_checkpoint(DEFAULT_BASE_MODEL, HOME))
    paths = write_adapters(config, HOME / "bench-adapters", args.adapters)
    settings = Settings.load(
        home=HOME,
        adapters=",".join(f"{path.name}={path.resolve()}" for path in paths),
        adapter_slots=max(len(paths), 1),
        dtype=args.dtype,
        threads=args.threads or cores(),
        max_seqs=args.max_seqs,
        kv_cache_tokens=args.max_seqs * 512,
        prefix_cache=False,
    )
    asked = Asked(build_engine(settings))
    try:
        measure(args, asked, [path.name for path in paths])
    finally:
        asked.engine.drain(0)


if __name__ == "__main__":
    main()
