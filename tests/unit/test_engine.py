"""The engine on a tiny model: the same tokens in any company, every job reported exactly once."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorabatch import Job
from lorabatch.errors import AdapterUnavailable
from lorabatch_kernels import native
from lorabatch_worker.adapters import store as store_module
from lorabatch_worker.engine import Engine
from lorabatch_worker.stop import decode
from tests.bad_adapters import write
from tests.models import WAIT_S, Desk, engine_for, load_with_peft

PROMPTS = (
    "Once upon a time",
    "The",
    "A longer prompt that takes more than one block, to be sure, and more than one chunk too",
    "x y z " * 12,
)
SAMPLING: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.7, "top_k": 50, "seed": 12},
    {"temperature": 1.3, "top_p": 0.8, "repetition_penalty": 1.2, "seed": 13},
)


@pytest.fixture(scope="module")
def configured(tiny_adapters: dict[str, Path]) -> str:
    return ",".join(f"{name}={path}" for name, path in tiny_adapters.items())


def start(folder: Path, home: Path, adapters: str = "", **fields: Any) -> Desk:
    return Desk(engine_for(folder, home, adapters=adapters, **fields))


@pytest.fixture(scope="module")
def desk(
    tiny_folder: Path, configured: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Desk]:
    """One engine for the tests that leave nothing behind."""
    made = start(tiny_folder, tmp_path_factory.mktemp("home"), configured)
    yield made
    assert made.engine.drain(WAIT_S) == []


@pytest.fixture
def own(tiny_folder: Path, configured: str, home: Path) -> Iterator[Desk]:
    """An engine for one test, which may break or stop it."""
    made = start(tiny_folder, home, configured)
    yield made
    made.engine.drain(0)


def job(job_id: str, prompt: str = PROMPTS[0], adapter: str | None = None, **params: Any) -> Job:
    params = {"max_new_tokens": 8, "ignore_eos": True, **params}
    return Job(job_id=job_id, prompt=prompt, adapter_id=adapter, sampling_params=params)


def mixture(names: list[str]) -> list[Job]:
    """Every prompt with every adapter and the base model, sampled in several ways."""
    return [
        job(f"{p}-{name}", prompt, name, **SAMPLING[(p + n) % len(SAMPLING)])
        for n, name in enumerate([None, *names])
        for p, prompt in enumerate(PROMPTS)
    ]


def leave_nothing(engine: Engine) -> None:
    """No block, slot or sequence is held when all jobs have ended."""
    scheduler = engine.scheduler
    assert scheduler.blocks.free == scheduler.blocks.capacity
    assert not any(scheduler.slots._users)
    assert not [*scheduler.running, *scheduler.waiting]
    assert len(engine.arrivals) == 0


def long(job_id: str, **fields: Any) -> Job:
    """Runs until it is ended."""
    return job(job_id, max_new_tokens=240, **fields)


# -- the same tokens in any company -------------------------------------------


@pytest.fixture(scope="module")
def alone(desk: Desk, tiny_adapters: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    """Tokens of each job of the mixture, one at a time."""
    return {
        j.job_id: desk.run(j.model_copy(update={"job_id": f"alone-{j.job_id}"}))[
            f"alone-{j.job_id}"
        ].token_ids
        for j in mixture(list(tiny_adapters))
    }


@pytest.mark.parametrize("order", ["as made", "reversed", "shuffled"])
def test_a_job_gets_the_same_tokens_alone_and_in_a_mixed_batch(
    order: str, own: Desk, alone: dict[str, tuple[int, ...]], tiny_adapters: dict[str, Path]
) -> None:
    jobs = mixture(list(tiny_adapters))
    if order == "reversed":
        jobs.reverse()
    elif order == "shuffled":
        random.Random(5).shuffle(jobs)
    results = own.run(*jobs)
    assert {i: r.token_ids for i, r in results.items()} == alone
    assert own.engine.load["mixed_steps"] > 5
    assert own.engine.load["adapters_resident"] == 3
    leave_nothing(own.engine)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_step_tokens": 16, "max_seqs": 4},
        {"max_step_tokens": 17, "max_seqs": 16, "block_size": 5},
        {"adapter_slots": 1, "max_seqs": 3, "block_size": 1},
        {"adapter_slots": 8, "max_seqs": 32, "kv_cache_tokens": 256, "block_size": 32},
    ],
)
def test_chunks_blocks_and_slots_do_not_change_tokens(
    fields: dict[str, Any],
    tiny_folder: Path,
    configured: str,
    home: Path,
    alone: dict[str, tuple[int, ...]],
    tiny_adapters: dict[str, Path],
) -> None:
    desk = start(tiny_folder, home, configured, **fields)
    results = desk.run(*mixture(list(tiny_adapters)))
    assert {i: r.token_ids for i, r in results.items()} == alone
    leave_nothing(desk.engine)
    assert desk.engine.drain(0) == []


def test_adapters_matter_and_each_one_differs(
    alone: dict[str, tuple[int, ...]], tiny_adapters: dict[str, Path]
) -> None:
    names = [None, *tiny_adapters]
    greedy = {
        name: alone[f"{p}-{name}"] for n, name in enumerate(names) for p in [(-n) % len(SAMPLING)]
    }
    same_prompt = Counter(alone[f"2-{name}"] for name in names)
    assert len(same_prompt) == len(names)
    assert len(greedy) == len(names)


def test_greedy_tokens_are_those_of_transformers_and_peft(
    desk: Desk, tiny_folder: Path, tiny_adapters: dict[str, Path]
) -> None:
    jobs = [job(f"parity-{n}", PROMPTS[2], n) for n in (None, *tiny_adapters)]
    results = desk.run(*jobs)
    for j in jobs:
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
        if j.adapter_id is not None:
            model = load_with_peft(model, tiny_adapters[j.adapter_id])
        ids = desk.engine.base.tokenizer(PROMPTS[2], return_tensors="pt")
        out = model.generate(
            **ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None
        )
        assert out[0, ids["input_ids"].shape[1] :].tolist() == list(results[j.job_id].token_ids)


def test_the_same_seed_repeats_and_another_does_not(desk: Desk) -> None:
    one, same, other = (
        job(f"seed-{i}", temperature=1.0, seed=seed, max_new_tokens=12)
        for i, seed in enumerate((1, 1, 2))
    )
    results = desk.run(one, same, other)
    texts = [results[j.job_id].token_ids for j in (one, same, other)]
    assert texts[0] == texts[1] != texts[2]
    assert [results[j.job_id].seed for j in (one, same, other)] == [1, 1, 2]


# -- how jobs end -------------------------------------------------------------


def test_length(desk: Desk) -> None:
    result = desk.run(job("length", max_new_tokens=5))["length"]
    assert (result.state, result.finish_reason) == ("succeeded", "length")
    assert (len(result.token_ids), result.usage.output_tokens) == (5, 5)
    assert result.usage.prompt_tokens == len(desk.engine.base.tokenizer(PROMPTS[0])["input_ids"])
    assert result.text == decode(desk.engine.base.tokenizer, result.token_ids)
    assert (result.attempt, result.submitted_us, result.started_us) == (1, 1, 2)


def test_end_token_and_ignore_eos(own: Desk) -> None:
    plain = own.run(job("plain"))["plain"]
    end = plain.token_ids[3]
    first = plain.token_ids.index(end)
    own.engine.base = _with_end(own.engine, end)
    results = own.run(job("ends", ignore_eos=False), job("goes-on"))
    assert results["ends"].finish_reason == "eos_token"
    assert results["ends"].token_ids == plain.token_ids[: first + 1]
    assert results["ends"].usage.output_tokens == first + 1
    assert results["goes-on"].finish_reason == "length"
    assert results["goes-on"].token_ids == plain.token_ids


def _with_end(engine: Engine, token: int) -> Any:
    from dataclasses import replace

    return replace(engine.base, eos_ids=frozenset({token}))


def test_stop_string(desk: Desk) -> None:
    plain = desk.run(job("plain-stop", max_new_tokens=20))["plain-stop"]
    assert plain.text is not None
    stop = plain.text[len(plain.text) // 2 :][:4]
    cut = plain.text[: plain.text.index(stop)]
    result = desk.run(job("stops", max_new_tokens=20, stop=["no such text", stop]))["stops"]
    assert (result.finish_reason, result.text) == ("stop_sequence", cut)
    made = result.usage.output_tokens
    assert result.token_ids == plain.token_ids[:made]
    tokenizer = desk.engine.base.tokenizer
    assert stop in decode(tokenizer, plain.token_ids[:made])
    assert stop not in decode(tokenizer, plain.token_ids[: made - 1])


def test_a_job_that_fills_the_context_to_the_last_token(desk: Desk) -> None:
    prompt = desk.engine.base.tokenizer(PROMPTS[1])["input_ids"]
    result = desk.run(job("full", PROMPTS[1], max_new_tokens=256 - len(prompt)))["full"]
    assert (result.state, result.usage.total_tokens) == ("succeeded", 256)


def test_what_cannot_run_fails_alone(desk: Desk, tmp_path: Path) -> None:
    results = desk.run(
        job("good", adapter="all"),
        job("unknown", adapter="nobody"),
        job("too-long", max_new_tokens=300),
        job("also-good"),
    )
    codes = {i: r.error.code if r.error else r.state for i, r in results.items()}
    assert codes == {
        "good": "succeeded",
        "unknown": "unknown_adapter",
        "too-long": "prompt_too_long",
        "also-good": "succeeded",
    }
    failed = results["unknown"]
    assert (failed.state, failed.text, failed.token_ids) == ("failed", None, ())
    assert failed.usage.total_tokens == 0
    assert failed.adapter_id == "nobody"
    assert failed.error is not None
    assert "'nobody'" in failed.error.message
    assert str(tmp_path.parent) not in failed.error.message


def test_a_broken_adapter_fails_its_jobs_by_name(own: Desk, home: Path) -> None:
    write(home / "adapters" / "bad")
    results = own.run(*(job(f"bad-{i}", adapter="bad") for i in range(3)), job("base"))
    assert results.pop("base").state == "succeeded"
    for result in results.values():
        assert result.error is not None
        assert result.error.code == "invalid_adapter"
        assert result.error.message.startswith("adapter 'bad': ")


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% for %}", "{{ messages[9].content }}"])
def test_a_broken_chat_template_fails_its_jobs_and_none_hangs(
    template: str, own: Desk, home: Path, tiny_adapters: dict[str, Path]
) -> None:
    import shutil

    shutil.copytree(tiny_adapters["all"], home / "adapters" / "chatty")
    (home / "adapters" / "chatty" / "chat_template.jinja").write_text(template)
    talk = Job(job_id="talk", adapter_id="chatty", messages=[{"role": "user", "content": "Hi"}])
    results = own.run(talk, job("plain", adapter="chatty"))
    assert (results["talk"].state, results["plain"].state) == ("failed", "succeeded")


def test_preparation_that_raises_anything_fails_its_job(
    own: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = own.engine.preparer.prepare

    def broken(c: Any, adapter: Any) -> Any:
        if c.job.job_id == "odd":
            raise ZeroDivisionError("secret")
        return prepare(c, adapter)

    monkeypatch.setattr(own.engine.preparer, "prepare", broken)
    results = own.run(job("odd"), job("even"))
    assert results["even"].state == "succeeded"
    error = results["odd"].error
    assert error is not None
    assert (error.code, "secret" in error.message) == ("engine_fault", False)


def test_the_chat_template_of_the_adapter_is_used(
    own: Desk, home: Path, tiny_adapters: dict[str, Path]
) -> None:
    import shutil

    shutil.copytree(tiny_adapters["all"], home / "adapters" / "own")
    template = "{{ messages[0].content }} ->"
    (home / "adapters" / "own" / "chat_template.jinja").write_text(template)
    params = {"max_new_tokens": 6, "ignore_eos": True}
    talk = [{"role": "user", "content": "Hi there"}]
    chat = {
        n: Job(job_id=n, adapter_id=n, messages=talk, sampling_params=params)
        for n in ("own", "all")
    }
    results = own.run(*chat.values(), job("plain", "Hi there ->", "all", max_new_tokens=6))
    assert results["own"].token_ids == results["plain"].token_ids != results["all"].token_ids
    assert results["own"].adapter_version != results["all"].adapter_version


# -- abort, drop, drain -------------------------------------------------------


def test_aborting_a_running_job_keeps_what_it_made(own: Desk) -> None:
    own.submit(long("gone"), long("failed"), job("stays", max_new_tokens=30))
    own.wait_started("gone")
    own.wait_started("failed")
    own.engine.abort("gone", "cancelled")
    own.engine.abort("failed", "lease_lost")
    results = own.wait(["gone", "failed", "stays"])
    assert (results["gone"].state, results["failed"].state) == ("cancelled", "failed")
    assert results["gone"].error is not None
    assert results["failed"].error is not None
    assert (results["gone"].error.code, results["failed"].error.code) == (
        "job_cancelled",
        "lease_lost",
    )
    assert results["gone"].text is None
    assert results["gone"].usage.output_tokens == len(results["gone"].token_ids) < 240
    assert results["stays"].state == "succeeded"
    leave_nothing(own.engine)


def test_aborting_a_waiting_job(tiny_folder: Path, home: Path) -> None:
    desk = start(tiny_folder, home, max_seqs=1)
    desk.submit(long("first"))
    desk.wait_started("first")
    desk.submit(job("second"), job("third"))
    desk.engine.abort("second", "cancelled")
    assert desk.wait(["second"])["second"].state == "cancelled"
    desk.engine.abort("first", "cancelled")
    assert desk.wait(["third"])["third"].state == "succeeded"
    assert "second" not in desk.started
    assert desk.engine.drain(0) == []


def test_aborting_a_job_whose_adapter_is_still_loading(
    own: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = _hold_loads(monkeypatch)
    own.submit(job("a", adapter="all"), job("b", adapter="all"), job("c", adapter="all"))
    own.engine.abort("a", "cancelled")
    own.engine.drop(["b"])
    assert own.wait(["a"])["a"].state == "cancelled"
    assert own.engine.load["waiting"] == 1
    release.set()
    assert own.wait(["c"])["c"].state == "succeeded"
    assert own.reported() == ["a", "c"]


def _hold_loads(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> threading.Event:
    """Adapter loads begin, but end (or raise) only once the event is set."""
    release = threading.Event()
    read = store_module.read_adapter

    def held(*args: Any) -> Any:
        assert release.wait(WAIT_S)
        if error is not None:
            raise error
        return read(*args)

    monkeypatch.setattr(store_module, "read_adapter", held)
    return release


def test_a_dropped_job_is_never_reported_and_may_come_again(own: Desk) -> None:
    own.submit(long("j"), long("k"))
    own.wait_started("j")
    own.engine.drop(["j", "k", "never seen"])
    own.submit(job("j", max_new_tokens=3))
    result = own.wait(["j"])["j"]
    assert len(result.token_ids) == 3
    own.run(job("last"))
    assert own.reported() == ["j", "last"]
    leave_nothing(own.engine)


def test_aborting_an_unknown_job_changes_nothing(own: Desk) -> None:
    own.engine.abort("later", "cancelled")
    own.run(job("before"))
    assert own.run(job("later"))["later"].state == "succeeded"


def test_drain_returns_exactly_what_did_not_end(
    tiny_folder: Path, configured: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = start(tiny_folder, home, configured, max_seqs=2)
    release = _hold_loads(monkeypatch, AdapterUnavailable("too late"))
    desk.submit(job("ends", max_new_tokens=2), long("runs"))
    desk.wait(["ends"])
    desk.submit(long("runs-too"), long("waits"), job("loads", adapter="all"))
    desk.wait_started("runs-too")
    left = desk.engine.drain(0)
    assert sorted(c.job.job_id for c in left) == ["loads", "runs", "runs-too", "waits"]
    assert desk.reported() == ["ends"]
    release.set()
    desk.engine.store._pool.shutdown(wait=True)
    desk.engine.abort("loads", "cancelled")
    assert desk.reported() == ["ends"]


def test_drain_lets_running_jobs_end_and_admits_none(tiny_folder: Path, home: Path) -> None:
    desk = start(tiny_folder, home, max_seqs=1)
    desk.submit(job("runs", max_new_tokens=40))
    desk.wait_started("runs")
    desk.submit(job("waits"))
    left = desk.engine.drain(WAIT_S)
    assert [c.job.job_id for c in left] == ["waits"]
    assert desk.reported() == ["runs"]
    assert not desk.engine._thread.is_alive()


# -- faults -------------------------------------------------------------------


def test_a_step_that_raises_fails_its_jobs_and_the_engine_goes_on(
    own: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = own.engine.runner.forward

    def broken(chunks: Any) -> Any:
        if any(c.sequence.job_id == "poison" for c in chunks):
            raise RuntimeError("secret detail")
        return forward(chunks)

    monkeypatch.setattr(own.engine.runner, "forward", broken)
    own.submit(long("neighbour", adapter="all"))
    own.wait_started("neighbour")
    own.submit(job("poison"))
    results = own.wait(["poison", "neighbour"])
    for result in results.values():
        assert result.error is not None
        assert result.error.code == "engine_fault"
        assert "secret" not in result.error.message
    assert own.run(job("after", adapter="all"))["after"].state == "succeeded"
    assert sorted(own.reported()) == ["after", "neighbour", "poison"]
    leave_nothing(own.engine)


@pytest.mark.parametrize("overlaps", [False, True])
def test_what_ended_is_reported_at_once_or_while_the_next_step_runs(
    overlaps: bool, own: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = own.engine
    engine.overlaps = overlaps
    events: list[str] = []
    forward, sample = engine.runner.forward, engine._sample

    class Waited:
        def __init__(self, draw: Any) -> None:
            self.draw = draw

        def wait(self) -> list[int]:
            events.append("wait")
            tokens: list[int] = self.draw.wait()
            return tokens

    def launched(chunks: Any) -> Any:
        events.append("launch")
        return forward(chunks)

    def report(outcomes: Any) -> None:
        events.extend(o.claim.job.job_id for o in outcomes)
        own._on_finished(outcomes)

    monkeypatch.setattr(engine.runner, "forward", launched)
    monkeypatch.setattr(engine, "_sample", lambda *args: Waited(sample(*args)))
    monkeypatch.setattr(engine, "_on_finished", report)
    own.run(job("short", max_new_tokens=2), job("long", max_new_tokens=6))
    assert events[events.index("short") - 1] == ("launch" if overlaps else "wait")
    assert events[-2:] == ["wait", "long"], "at once where no step comes after it"
    leave_nothing(engine)


def test_an_engine_that_reports_later_reports_all_and_the_same(
    own: Desk, alone: dict[str, tuple[int, ...]], tiny_adapters: dict[str, Path]
) -> None:
    own.engine.overlaps = True
    results = own.run(*mixture(list(tiny_adapters)))
    assert {i: r.token_ids for i, r in results.items()} == alone
    leave_nothing(own.engine)
    own.submit(job("ends", max_new_tokens=2), long("runs"))
    own.wait(["ends"])
    assert [c.job.job_id for c in own.engine.drain(0)] == ["runs"]
    assert sorted(own.reported()) == sorted([*alone, "ends"])


def test_a_step_that_fails_while_outcomes_wait_loses_none(
    own: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.engine.overlaps = True
    forward, calls = own.engine.runner.forward, [0]

    def broken(chunks: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("no")
        return forward(chunks)

    monkeypatch.setattr(own.engine.runner, "forward", broken)
    results = own.run(job("short", max_new_tokens=2), job("other"))
    assert (results["short"].state, results["other"].state) == ("succeeded", "failed")
    leave_nothing(own.engine)


def test_an_adapter_of_extreme_weights_hurts_nobody_else(
    own: Desk, home: Path, tiny_adapters: dict[str, Path]
) -> None:
    """Finite in the file, infinite in a product: its job is its own problem."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = home / "adapters" / "extreme"
    shutil.copytree(tiny_adapters["all"], folder)
    path = folder / "adapter_model.safetensors"
    save_file({k: torch.full_like(t, 3e38) for k, t in load_file(path).items()}, path)
    clean = own.run(job("clean"))["clean"]
    results = own.run(*(job(f"extreme-{i}", adapter="extreme") for i in range(4)), job("same-time"))
    assert results["same-time"].token_ids == clean.token_ids
    later = own.run(*(job(f"later-{i}") for i in range(8)))
    assert {r.token_ids for r in later.values()} == {clean.token_ids}


def test_every_job_is_reported_once_under_random_submits_aborts_and_drops(
    tiny_folder: Path, configured: str, home: Path
) -> None:
    desk = start(tiny_folder, home, configured, max_seqs=6, max_step_tokens=32, adapter_slots=2)
    names = [None, "all", "rslora", "attention", "nobody"]
    dropped: set[str] = set()

    def client(number: int) -> None:
        rng = random.Random(number)
        for i in range(25):
            group = [
                job(
                    f"{number}-{i}-{k}",
                    rng.choice(PROMPTS),
                    rng.choice(names),
                    max_new_tokens=rng.randrange(1, 12),
                )
                for k in range(rng.randrange(1, 4))
            ]
            desk.submit(*group)
            if rng.random() < 0.3:
                desk.engine.abort(rng.choice(group).job_id, "cancelled")
            if rng.random() < 0.2:
                victim = rng.choice(group).job_id
                dropped.add(victim)
                desk.engine.drop([victim])
            submitted.extend(j.job_id for j in group)
            time.sleep(rng.random() * 0.01)

    submitted: list[str] = []
    threads = [threading.Thread(target=client, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    desk.wait(set(submitted) - dropped)
    left = [c.job.job_id for c in desk.engine.drain(WAIT_S)]
    reported = desk.reported()
    assert len(reported) == len(set(reported))
    assert not set(reported) & set(left)
    assert set(submitted) - set(reported) - set(left) <= dropped
    leave_nothing(desk.engine)


def test_load_and_description_tell_what_runs(
    desk: Desk, tiny_adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = desk.engine.load
    desk.run(job("counted", max_new_tokens=4))
    after = desk.engine.load
    assert after["generated_tokens"] == before["generated_tokens"] + 4
    assert after["steps"] == before["steps"] + 4
    assert (after["waiting"], after["running"]) == (0, 0)
    assert desk.engine.description["adapters"] == sorted(tiny_adapters)
    assert desk.engine.description["kernels"] == "compiled"
    monkeypatch.setattr(native, "problem", lambda: "no compiler")
    assert desk.engine.description["kernels"] == "torch operators, slower: no compiler"
    assert desk.engine.last_progress_s <= time.monotonic()


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_cache_tokens": 16, "max_context_tokens": 16},
        {"kv_cache_tokens": 256, "block_size": 256},
        {"max_seqs": 1, "max_step_tokens": 16, "adapter_slots": 1, "max_adapter_rank": 1},
    ],
)
def test_the_smallest_settings_start_and_run(
    fields: dict[str, Any], tiny_folder: Path, home: Path
) -> None:
    desk = start(tiny_folder, home, **fields)
    results = desk.run(*(job(f"j{i}", "a b", max_new_tokens=5) for i in range(3)))
    assert {r.state for r in results.values()} == {"succeeded"}
    assert [c.job.job_id for c in desk.engine.drain(0)] == []


def test_nan_logits_end_that_job_alone_and_are_not_billed_as_a_success(
    tiny_folder: Path, tiny_adapters: dict[str, Path], home: Path, tmp_path: Path
) -> None:
    name, folder = next(iter(tiny_adapters.items()))
    shutil.copytree(folder, tmp_path / "wild")
    weights = tmp_path / "wild" / "adapter_model.safetensors"
    save_file({k: t * 1e25 for k, t in load_file(weights).items()}, weights)
    desk = start(tiny_folder, home, f"{name}={folder},wild={tmp_path / 'wild'}")
    alone = desk.run(job("alone", adapter=name))["alone"]
    results = desk.run(job("wild", adapter="wild"), job("tame", adapter=name), job("base"))
    assert results["wild"].state == "failed"
    assert results["wild"].error is not None
    assert results["wild"].error.code == "nonfinite_logits"
    assert results["tame"].token_ids == alone.token_ids
    assert results["base"].state == "succeeded"
    leave_nothing(desk.engine)
    desk.engine.drain(0)
