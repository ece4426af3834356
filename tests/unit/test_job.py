"""The job: every bad input is refused with a sentence that names field, value and wish."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabatch import Job, SamplingParams
from lorabatch.errors import InvalidJob
from lorabatch.job import MAX_SEED, is_identifier
from tests.bad_inputs import BAD_JOBS


@pytest.mark.parametrize(
    ("fields", "message"), [row[1:] for row in BAD_JOBS], ids=[row[0] for row in BAD_JOBS]
)
def test_a_bad_job_is_refused(fields: Any, message: str) -> None:
    whole = {"prompt": "hi", **fields} if isinstance(fields, dict) else fields
    with pytest.raises(InvalidJob) as caught:
        Job.parse(whole)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert "\x00" not in text
    assert len(text) < 400


def test_an_error_names_the_job_and_all_its_bad_fields() -> None:
    with pytest.raises(InvalidJob) as caught:
        Job.parse({"job_id": "j1", "prompt": "a", "priority": 999, "tenant": ""})
    assert str(caught.value).startswith("job 'j1': tenant: ")
    assert "priority: " in str(caught.value)


def test_a_bare_prompt_is_a_greedy_job_of_the_base_model() -> None:
    job = Job.parse({"prompt": "hi"})
    assert (job.tenant, job.adapter_id, job.priority) == ("default", None, 0)
    assert job.sampling_params == SamplingParams(temperature=0.0, max_new_tokens=256)
    assert job.key == job.job_id


def test_the_hash_sees_what_decides_the_outcome_and_nothing_else() -> None:
    base = {"prompt": "hi", "tenant": "acme", "adapter_id": "sql"}
    first = Job.parse(base).request_hash()
    for same in ({"priority": 5}, {"custom_id": "x"}, {"idempotency_key": "k"}, {"job_id": "j"}):
        assert Job.parse({**base, **same}).request_hash() == first
    for other in (
        {"prompt": "ho"},
        {"tenant": "b"},
        {"adapter_id": "xml"},
        {"adapter_id": None},
        {"sampling_params": {"seed": 1}},
    ):
        assert Job.parse({**base, **other}).request_hash() != first


def test_a_seed_is_given_or_follows_from_the_id() -> None:
    assert Job.parse({"prompt": "a", "sampling_params": {"seed": 7}}).seed == 7
    one, again = (Job.parse({"prompt": text, "job_id": "j"}) for text in "ab")
    assert one.seed == again.seed != Job.parse({"prompt": "a", "job_id": "k"}).seed
    assert 0 <= one.seed <= MAX_SEED


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1))
def test_any_other_text_is_a_prompt_and_survives_json(prompt: str) -> None:
    job = Job.parse({"prompt": prompt})
    assert Job.model_validate_json(job.model_dump_json()) == job
    assert job.body()["prompt"] == prompt


@pytest.mark.parametrize("text", ["a", "A-1_b.c:d@e", "9" * 64])
def test_identifiers(text: str) -> None:
    assert is_identifier(text)


@pytest.mark.parametrize("text", ["", "-a", "a b", "a\n", "9" * 65, "ä", "=a", None, 5])
def test_no_identifiers(text: object) -> None:
    assert not is_identifier(text)


def test_what_is_wrong_is_said_shortly_however_much_it_is() -> None:
    """To name a million errors took 20 s, 2 GB and an answer of 128 MB."""
    for fields in (
        {"prompt": "x", "sampling_params": {"logit_bias": {f"a{n}": 1 for n in range(5000)}}},
        {"messages": [5] * 5000},
        {"prompt": "x", **{f"a{n}": 1 for n in range(5000)}},
    ):
        with pytest.raises(InvalidJob, match=r"5,00\d fields or items are wrong") as refused:
            Job.parse(fields)
        assert len(str(refused.value)) < 200
    with pytest.raises(InvalidJob, match="no such field") as refused:
        Job.parse({"prompt": "x", "y" * 100_000: 1})
    assert len(str(refused.value)) < 200
