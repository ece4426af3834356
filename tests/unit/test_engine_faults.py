"""A job, adapter or step that is broken fails by name and hurts nobody else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabatch import Job
from lorabatch_worker import outcome
from lorabatch_worker.adapters.wanted import Wanted
from tests.bad_adapters import write
from tests.desk import WAIT_S, Desk, job, leave_nothing, long, start


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


def test_a_result_that_cannot_be_made_fails_its_job_alone(
    own: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three end in the same step."""
    choice_of = outcome.choice_of

    def broken(sequence: Any, tokenizer: Any) -> Any:
        if sequence.job_id == "bad":
            raise RuntimeError("secret detail")
        return choice_of(sequence, tokenizer)

    monkeypatch.setattr(outcome, "choice_of", broken)
    results = own.run(job("good"), job("bad"), job("good-too"))
    error = results.pop("bad").error
    assert error is not None
    assert (error.code, "secret" in error.message) == ("engine_fault", False)
    assert [r.state for r in results.values()] == ["succeeded", "succeeded"]
    leave_nothing(own.engine)


def test_an_adapter_that_the_device_has_no_room_for_fails_its_jobs_alone(
    own: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.engine.store.request(Wanted("", "all")).result(WAIT_S)  # as the engine does at its start
    slots = own.engine.scheduler.slots
    load = slots._load

    def no_room(adapter: Any, resident: Any) -> None:
        if adapter.adapter_id == "all":
            raise torch.OutOfMemoryError("secret detail")
        load(adapter, resident)

    monkeypatch.setattr(slots, "_load", no_room)
    names = {"large-0": "all", "large-1": "all", "small": "attention", "base": None}
    results = own.run(*(job(name, adapter=adapter) for name, adapter in names.items()))
    assert {results[name].state for name in ("small", "base")} == {"succeeded"}
    for name in ("large-0", "large-1"):
        error = results[name].error
        assert error is not None
        assert "'all'" in error.message
        assert "OutOfMemoryError" in error.message
        assert "secret" not in error.message
    again = own.run(job("again", adapter="all"))["again"].error
    assert again is not None
    assert "tried again" in again.message, "not before some time has passed"
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
