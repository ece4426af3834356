"""Several texts of one job: their tokens, their ends, and what becomes of the job as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorabatch import Job, Ledger
from lorabatch.candidates import seed_of
from lorabatch.claim import Claim
from lorabatch.ledger import Outcome
from lorabatch_producer.audit import audit
from lorabatch_worker.engine import Engine
from lorabatch_worker.sequence import Sequence
from tests.desk import PROMPTS, WAIT_S, Desk, job, leave_nothing, long, start
from tests.models import claim

SAMPLED: dict[str, Any] = {"temperature": 1.2, "seed": 21}
LONG_PROMPT = PROMPTS[2]


def single(number: int, **params: Any) -> Job:
    """What is to have the tokens of text `number` of a job with the same parameters."""
    seed = seed_of(SAMPLED["seed"], number)
    return job(f"single-{number}", LONG_PROMPT, "all", **{**SAMPLED, **params, "seed": seed})


def test_n_texts_are_those_of_n_jobs_with_their_seeds(desk: Desk) -> None:
    params = {"max_new_tokens": 12, "ignore_eos": True}
    many = desk.run(job("many", LONG_PROMPT, "all", n=3, **SAMPLED, **params))["many"]
    singles = desk.run(*(single(number, **params) for number in range(3)))
    assert many.choices is not None
    wanted = [singles[f"single-{number}"] for number in range(3)]
    assert [c.token_ids for c in many.choices] == [r.token_ids for r in wanted]
    assert [(c.text, c.finish_reason, c.seed) for c in many.choices] == [
        (r.text, r.finish_reason, r.seed) for r in wanted
    ]
    assert len({c.token_ids for c in many.choices}) == 3
    assert (many.text, many.token_ids) == (wanted[0].text, wanted[0].token_ids)
    assert many.usage.prompt_tokens == wanted[0].usage.prompt_tokens
    assert many.usage.output_tokens == 36
    assert desk.started.count("many") == desk.reported().count("many") == 1
    leave_nothing(desk.engine)


def test_the_prompt_of_several_texts_is_computed_once(own: Desk) -> None:
    result = own.run(job("many", LONG_PROMPT, n=4, max_new_tokens=3, **SAMPLED))["many"]
    block = own.engine.scheduler.blocks.block_size
    prompt = result.usage.prompt_tokens
    shared = (prompt - 1) // block * block
    assert shared > 0
    assert result.usage.cached_tokens == 0
    assert own.engine.counters.step_tokens == prompt + 3 * (prompt - shared) + 4 * 2


def test_texts_end_each_for_itself_and_the_job_with_the_last(own: Desk) -> None:
    wanted = own.run(*(single(number, max_new_tokens=40) for number in range(3)))
    stop = wanted["single-1"].text or ""
    result = own.run(
        job("many", LONG_PROMPT, "all", n=3, max_new_tokens=40, stop=[stop[:4]], **SAMPLED)
    )["many"]
    assert result.choices is not None
    assert result.choices[1].finish_reason == "stop_sequence"
    assert result.choices[1].text == ""
    assert "length" in {c.finish_reason for c in result.choices}
    assert result.usage.output_tokens == sum(len(c.token_ids) for c in result.choices)
    leave_nothing(own.engine)


def test_best_of_keeps_those_with_the_highest_mean_log_probability(desk: Desk) -> None:
    params = {**SAMPLED, "max_new_tokens": 6}
    everything = desk.run(job("all-of-them", n=5, logprobs=True, **params))["all-of-them"]
    best = desk.run(job("best", n=2, best_of=5, **params))["best"]
    assert everything.choices is not None
    assert best.choices is not None
    order = sorted(everything.choices, key=lambda c: -c.mean_logprob)
    assert [c.token_ids for c in best.choices] == [c.token_ids for c in order[:2]]
    assert best.discarded is not None
    assert set(best.discarded) == {c.token_ids for c in order[2:]}
    assert best.usage.output_tokens == 30
    assert {c.tokens for c in best.choices} == {None}
    one = desk.run(job("one", best_of=5, **params))["one"]
    assert (one.choices, one.token_ids, one.seed) == (None, order[0].token_ids, order[0].seed)


def test_a_job_with_more_texts_than_places_runs(tiny_folder: Path, home: Path) -> None:
    desk = start(tiny_folder, home, max_seqs=2)
    results = desk.run(job("many", n=5, **SAMPLED), job("other"))
    assert len(results["many"].choices or ()) == 5
    assert desk.reported().count("many") == 1
    leave_nothing(desk.engine)
    assert desk.engine.drain(WAIT_S) == []


def test_texts_that_lose_their_blocks_are_what_they_were(tiny_folder: Path, home: Path) -> None:
    roomy, tight = start(tiny_folder, home), start(tiny_folder, home, kv_cache_tokens=256)
    many = job("many", n=4, max_new_tokens=100, logprobs=True, **SAMPLED)
    wanted, found = (desk.run(many)["many"] for desk in (roomy, tight))
    assert tight.engine.scheduler.preemptions > 0
    assert found.choices is not None
    assert [c.token_ids for c in found.choices] == [c.token_ids for c in wanted.choices or ()]
    assert [len(c.tokens or ()) for c in found.choices] == [100] * 4
    assert tight.started == ["many"]
    for desk in (roomy, tight):
        leave_nothing(desk.engine)
        desk.engine.drain(0)


def test_a_job_is_cancelled_and_dropped_with_all_its_texts(own: Desk) -> None:
    texts = {"temperature": 1.0, "n": 3}
    own.submit(long("gone", **texts), long("dropped", **texts), job("stays", max_new_tokens=30))
    own.wait_started("gone")
    own.wait_started("dropped")
    own.engine.drop(["dropped"])
    own.engine.abort("gone", "cancelled")
    results = own.wait(["gone", "stays"])
    gone = results["gone"]
    assert (gone.state, gone.text, gone.choices) == ("cancelled", None, None)
    assert len(gone.discarded or ()) == 2
    assert gone.usage.output_tokens == len(gone.token_ids) + sum(map(len, gone.discarded or ()))
    assert sorted(own.reported()) == ["gone", "stays"]
    leave_nothing(own.engine)


def test_one_text_without_sound_logits_fails_its_job_once(
    own: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them in the same step, in which the third one has a token."""
    forward = own.engine.runner.forward

    def spoilt(chunks: Any) -> torch.Tensor:
        logits = forward(chunks).clone()
        sampling: list[Sequence] = [c.sequence for c in chunks if c.samples]
        for row, one in enumerate(sampling):
            if one.key in ("bad", "bad#2") and len(one.output) == 4:
                logits[row] = torch.nan
        return logits

    monkeypatch.setattr(own.engine.runner, "forward", spoilt)
    results = own.run(long("bad", n=3, temperature=1.0), job("good"))
    assert results["bad"].error is not None
    assert results["bad"].error.code == "nonfinite_logits"
    assert results["good"].state == "succeeded"
    assert own.reported().count("bad") == 1
    leave_nothing(own.engine)


def test_a_step_that_fails_takes_a_job_along_once(
    own: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = own.engine.runner.forward

    def fails(chunks: Any) -> torch.Tensor:
        if len([c for c in chunks if c.sequence.job_id == "bad"]) == 3:
            raise ValueError("no such kernel")
        return forward(chunks)

    monkeypatch.setattr(own.engine.runner, "forward", fails)
    result = own.run(long("bad", n=3, temperature=1.0))["bad"]
    assert result.error is not None
    assert result.error.code == "engine_fault"
    assert own.run(job("next"))["next"].state == "succeeded"
    assert own.reported() == ["bad", "next"]
    leave_nothing(own.engine)


def test_steps_in_portions_compute_all_texts(own: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much memory as two tokens take, and a text that fails while its siblings are to come."""
    wanted = own.run(job("wanted", n=3, max_new_tokens=6, **SAMPLED))["wanted"]
    forward = own.engine.runner.forward

    def small(chunks: Any) -> torch.Tensor:
        if sum(c.end - c.start for c in chunks) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        logits = forward(chunks).clone()
        sampling: list[Sequence] = [c.sequence for c in chunks if c.samples]
        for row, one in enumerate(sampling):
            if one.key == "bad" and len(one.output) == 2:
                logits[row] = torch.nan
        return logits

    monkeypatch.setattr(own.engine.runner, "forward", small)
    results = own.run(
        long("bad", n=3, temperature=1.0), job("found", n=3, max_new_tokens=6, **SAMPLED)
    )
    assert results["bad"].state == "failed"
    assert results["found"].choices == wanted.choices
    leave_nothing(own.engine)


def test_drain_hands_back_a_job_of_which_some_texts_ended(own: Desk) -> None:
    own.submit(long("left", n=2, temperature=1.0))
    own.wait_started("left")
    left = own.engine.drain(0)
    assert [c.job.job_id for c in left] == ["left"]
    assert own.reported() == []


def test_a_suspect_is_alone_with_all_its_texts(tiny_folder: Path, home: Path) -> None:
    """From its first text to its last, though not all of them run at once."""
    desk = start(tiny_folder, home, max_seqs=2)
    seen = _companies(desk.engine)
    suspect = claim(job("suspect", n=5, max_new_tokens=40, **SAMPLED))
    desk.engine.submit([_suspected(suspect)])
    desk.wait_started("suspect")
    desk.submit(*(job(i).model_copy(update={"priority": 5}) for i in ("other", "another")))
    results = desk.wait(["suspect", "other", "another"])
    assert len(results["suspect"].choices or ()) == 5
    assert desk.started.count("suspect") == 1
    ran = [company for company in seen if "suspect" in company]
    assert {frozenset(c) for c in ran} == {frozenset({"suspect"})}
    last = max(i for i, c in enumerate(seen) if "suspect" in c)
    assert all("suspect" in company for company in seen[: last + 1])
    desk.engine.drain(0)


def _suspected(one: Claim) -> Claim:
    return Claim(one.job, one.lease_token, one.attempt, one.submitted_us, one.started_us, crashes=2)


def _companies(engine: Engine) -> list[set[str]]:
    """The jobs of each step, as it is computed."""
    seen: list[set[str]] = []
    forward = engine.runner.forward

    def watched(chunks: Any) -> torch.Tensor:
        seen.append({c.sequence.job_id for c in chunks})
        return forward(chunks)

    engine.runner.forward = watched  # type: ignore[method-assign]
    return seen


def test_the_books_are_right(desk: Desk, ledger: Ledger) -> None:
    """Of what this engine makes of jobs that keep all, some and none of their texts."""
    whole = job("whole", n=3, logprobs=True, top_logprobs=2, **SAMPLED)
    some = job("some", n=2, best_of=4, **SAMPLED)
    cut = long("cut", n=2, temperature=1.0)
    ledger.accept([whole, some, cut, job("plain")])
    claims = ledger.claim(["whole", "some", "cut", "plain"], "me", 60)
    desk.engine.submit(list(claims.values()))
    desk.wait_started("cut")
    desk.engine.abort("cut", "cancelled")
    made = desk.wait(claims)
    ledger.record([Outcome(claims[job_id], result) for job_id, result in made.items()])
    assert audit(ledger.engine) == []
    found = ledger.results(list(claims))
    for job_id, result in made.items():
        assert found[job_id].choices == result.choices
        assert found[job_id].usage == result.usage
    assert {i: found[i].usage.output_tokens for i in ("whole", "some", "plain")} == {
        **{"whole": 24, "some": 32, "plain": 8}
    }


def test_log_probabilities_are_those_of_transformers(desk: Desk, tiny_folder: Path) -> None:
    """Of the model itself, whatever biases, penalties and temperature did to the draw."""
    changed = {"logit_bias": {"5": 3.5}, "frequency_penalty": 1.0, "top_k": 4}
    params = {**SAMPLED, **changed, "logprobs": True, "top_logprobs": 3, "max_new_tokens": 8}
    (choice,) = desk.run(job("told", LONG_PROMPT, **params))["told"].choices or ()
    ids = desk.engine.base.tokenizer(LONG_PROMPT)["input_ids"]
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = reference(torch.tensor([[*ids, *choice.token_ids]])).logits[0, len(ids) - 1 : -1]
    wanted = torch.log_softmax(logits, dim=-1)
    assert choice.tokens is not None
    assert [token.token_id for token in choice.tokens] == list(choice.token_ids)
    for token, row in zip(choice.tokens, wanted, strict=True):
        top = row.topk(3)
        assert token.logprob == pytest.approx(row[token.token_id].item(), abs=1e-4)
        assert [one.token_id for one in token.top] == top.indices.tolist()
        assert [one.logprob for one in token.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert b"".join(bytes(t.raw) for t in choice.tokens).decode(errors="replace") == choice.text
