"""What an adapter wants where a job says nothing: read, merged, and the job's own word first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from lorabatch import Job, Ledger, SamplingParams
from lorabatch.errors import InvalidAdapter, PromptTooLong
from lorabatch.tables import jobs
from lorabatch_worker.adapters.defaults import GenerationDefaults, read_defaults
from lorabatch_worker.adapters.weights import Adapter, read_adapter
from lorabatch_worker.base_model import BaseModel
from lorabatch_worker.outcome import finished
from lorabatch_worker.prompt import Preparer
from lorabatch_worker.sequence import Sequence
from tests import bad_adapters
from tests.bad_adapters.defaults import DEFAULTS_ROWS
from tests.desk import Desk
from tests.models import as_base, claim, tiny_config, tiny_model


@pytest.fixture(scope="module")
def base(tokenizer: Any) -> BaseModel:
    return as_base(tiny_model(tiny_config("llama")), tokenizer)


def read(folder: Path, tokenizer_config: Any = None, **fields: Any) -> GenerationDefaults | None:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    if tokenizer_config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return read_defaults(folder, 1000)


def params_of(folder: Path, **fields: Any) -> dict[str, Any]:
    found = read(folder, **fields)
    return {} if found is None else dict(found.params)


def prepare(base: BaseModel, defaults: GenerationDefaults | None, **fields: Any) -> Sequence:
    adapter = Adapter("a", "version", {}, None, defaults=defaults)
    job = Job(job_id="j", **{"prompt": " a" * 6, **fields})
    return Preparer(base).prepare(claim(job), adapter)


# -- the files ----------------------------------------------------------------


def test_all_listed_fields_are_read_by_their_names(tmp_path: Path) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "typical_p": 0.8}
    fields |= {"repetition_penalty": 1.2, "max_new_tokens": 99}
    found = read(
        tmp_path,
        {"eos_token": "<|im_end|>"},
        do_sample=True,
        stop_strings=["###", "END"],
        eos_token_id=[3, 5],
        transformers_version="5.17.0",
        num_beams=4,
        **fields,
    )
    wanted = {**fields, "stop": ("###", "END")}
    assert found == GenerationDefaults(wanted, frozenset({3, 5}), "<|im_end|>")


def test_one_stop_string_one_end_token_and_an_added_token(tmp_path: Path) -> None:
    found = read(
        tmp_path, {"eos_token": {"content": "</s>"}}, stop_strings="END", eos_token_id=0, top_k=None
    )
    assert found == GenerationDefaults({"stop": ("END",)}, frozenset({0}), "</s>")


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"temperature": 0.7}, {}),
        ({"temperature": 0.7, "do_sample": False, "top_p": 0.5}, {"top_p": 0.5}),
        ({"do_sample": None, "temperature": 0.7}, {}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": True, "temperature": 1, "top_k": 0}, {"temperature": 1.0, "top_k": 0}),
    ],
)
def test_a_text_is_greedy_without_do_sample(
    fields: dict[str, Any], wanted: dict[str, Any], tmp_path: Path
) -> None:
    assert params_of(tmp_path, **fields) == wanted


def test_the_defaults_of_do_sample_are_transformers() -> None:
    from transformers import GenerationConfig

    theirs = GenerationConfig._get_default_generation_params()
    assert (theirs["temperature"], theirs["top_k"], theirs["top_p"]) == (1.0, 50, 1.0)


def test_without_files_there_is_nothing(tmp_path: Path) -> None:
    assert read_defaults(tmp_path, None) is None
    assert read(tmp_path, {"model_max_length": 5}, bos_token_id=1) is None


def test_they_are_part_of_the_adapter_and_its_version(tmp_path: Path) -> None:
    bad_adapters.write(tmp_path)
    before = read_adapter("x", tmp_path, bad_adapters.TARGET)
    assert before.defaults is None
    (tmp_path / "generation_config.json").write_text('{"top_k": 4, "eos_token_id": 8}')
    after = read_adapter("x", tmp_path, bad_adapters.TARGET)
    assert after.defaults == GenerationDefaults({"top_k": 4}, frozenset({8}))
    assert after.version != before.version


@pytest.mark.timeout(30)
@pytest.mark.parametrize("bad", DEFAULTS_ROWS, ids=lambda bad: bad.what)
def test_bad_defaults_are_refused_by_name(bad: bad_adapters.Bad, tmp_path: Path) -> None:
    bad.make(tmp_path / "adapter")
    with pytest.raises(InvalidAdapter) as caught:
        read_adapter("mine", tmp_path / "adapter", bad_adapters.TARGET)
    message = str(caught.value)
    assert message.startswith("adapter 'mine': ")
    for word in bad.words:
        assert word in message
    assert str(tmp_path) not in message
    assert "\n" not in message
    assert len(message) < 1000


# -- with a job ---------------------------------------------------------------


def test_the_jobs_own_values_win_even_if_they_are_our_defaults(base: BaseModel) -> None:
    wants = GenerationDefaults({"temperature": 0.7, "top_p": 0.5, "max_new_tokens": 9})
    nothing = prepare(base, wants)
    assert nothing.params == SamplingParams(temperature=0.7, top_p=0.5, max_new_tokens=9)
    given = prepare(base, wants, sampling_params={"temperature": 0.0, "max_new_tokens": 100})
    assert given.params == SamplingParams(temperature=0.0, top_p=0.5, max_new_tokens=100)
    assert nothing.max_length == 15
    assert prepare(base, None, sampling_params={"top_k": 3, "max_new_tokens": 1}).params.top_k == 3


def test_a_large_default_is_cut_to_what_fits(base: BaseModel) -> None:
    wants = GenerationDefaults({"max_new_tokens": 100_000})
    assert prepare(base, wants).params.max_new_tokens == 250
    assert prepare(base, wants).max_length == 256
    for fields in ({"sampling_params": {"max_new_tokens": 251}}, {"prompt": " a" * 256}):
        with pytest.raises(PromptTooLong):
            prepare(base, wants, **fields)
    much = SamplingParams(n=16, temperature=1.0, logprobs=True, top_logprobs=20)
    assert wants.complete(much, 9_999).max_new_tokens == 200_000 // 16 // 21
    with pytest.raises(PromptTooLong):  # ours is not cut, as ever
        prepare(base, GenerationDefaults({"top_k": 3}))


def test_the_adapters_stop_strings_end_and_trim_the_text(base: BaseModel) -> None:
    wants = GenerationDefaults({"stop": ("END",), "max_new_tokens": 50})
    sequence = prepare(base, wants)
    for token in base.tokenizer("one two END three")["input_ids"]:
        if sequence.finish_reason is None:
            sequence.append(token, frozenset())
    assert sequence.finish_reason == "stop_sequence"
    assert finished(sequence, base).result.text == "one two "
    assert prepare(base, wants, sampling_params={"stop": []}).stop_watch is None


def test_end_tokens_of_the_adapter_come_beside_the_base_models(base: BaseModel) -> None:
    end = base.tokenizer.convert_tokens_to_ids("<|im_end|>")
    wants = GenerationDefaults({"max_new_tokens": 50}, frozenset({7}), "<|im_end|>")
    for token in (7, end, 5):
        sequence = prepare(base, wants)
        sequence.append(9, frozenset({5}))
        assert sequence.finish_reason is None
        sequence.append(token, frozenset({5}))
        assert sequence.finish_reason == "eos_token"
    deaf = prepare(base, wants, sampling_params={"ignore_eos": True})
    deaf.append(end, frozenset({5}))
    assert deaf.finish_reason is None


@pytest.mark.parametrize("text", ["<|eot_id|>", "two words", ""])
def test_an_end_token_that_the_base_model_lacks_is_left_aside(base: BaseModel, text: str) -> None:
    wants = GenerationDefaults({"max_new_tokens": 5}, end_token=text)
    assert prepare(base, wants).end_ids == frozenset()


def test_a_stop_string_that_is_a_special_token_is_an_end_token(base: BaseModel) -> None:
    """It is in no text, so that no stop string would find it; an ordinary token is in the text."""
    end = base.tokenizer.convert_tokens_to_ids("<|im_end|>")
    wants = GenerationDefaults({"stop": ("<|im_end|>", "the"), "max_new_tokens": 5})
    assert prepare(base, wants).end_ids == {end}
    assert prepare(base, wants, sampling_params={"stop": ["x"]}).end_ids == frozenset()


def test_the_ledger_keeps_which_fields_were_given(ledger: Ledger) -> None:
    given = {"temperature": 0.0, "seed": None, "stop": "x"}
    said = Job.parse({"job_id": "said", "prompt": "p", "sampling_params": given})
    silent = Job.parse({"job_id": "silent", "prompt": "p"})
    ledger.accept([said, silent])
    with ledger.engine.connect() as connection:
        rows = connection.execute(sa.select(jobs.c.job_id, jobs.c.body)).all()
    bodies = {row.job_id: row.body for row in rows}
    assert bodies["said"]["sampling_params"] == {"temperature": 0.0, "stop": ["x"]}
    assert bodies["silent"]["sampling_params"] == {}
    claims = ledger.claim(["said", "silent"], "me", 60)
    fields = {name: c.job.sampling_params.model_fields_set for name, c in claims.items()}
    assert fields == {"said": {"temperature", "stop"}, "silent": set()}
    assert claims["silent"].job.sampling_params == SamplingParams()


def test_a_body_from_before_says_everything_itself(base: BaseModel) -> None:
    """Bodies used to hold every field: such a job runs as it would have then."""
    old = Job.parse({"prompt": " a", "sampling_params": SamplingParams().model_dump(mode="json")})
    wants = GenerationDefaults({"temperature": 0.7, "max_new_tokens": 9, "stop": ("x",)})
    assert wants.complete(old.sampling_params, 200) == SamplingParams()


# -- in the engine ------------------------------------------------------------


def test_an_engine_runs_an_adapters_defaults_and_its_template(
    own: Desk, home: Path, tiny_adapters: dict[str, Path]
) -> None:
    folder = home / "adapters" / "shy"
    shutil.copytree(tiny_adapters["all"], folder)
    (folder / "generation_config.json").write_text('{"max_new_tokens": 3}')
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }} =>")
    talk = [{"role": "user", "content": "Hi"}]
    silent = Job.parse({"job_id": "silent", "adapter_id": "shy", "messages": talk})
    says = Job.parse(
        {
            **{"job_id": "says", "adapter_id": "shy", "prompt": "Hi =>"},
            "sampling_params": {"max_new_tokens": 5, "ignore_eos": True},
        }
    )
    own.submit(silent, says)
    results = own.wait(["silent", "says"])
    assert results["says"].usage.output_tokens == 5
    made = results["silent"].token_ids
    assert len(made) <= 3
    assert made == results["says"].token_ids[: len(made)]
