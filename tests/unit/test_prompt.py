"""From job to tokens: plain prompts, chat templates, and every way in which they fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lorabatch import Job
from lorabatch.errors import InvalidAdapter, InvalidJob, LoraBatchError, PromptTooLong
from lorabatch_worker.adapters.weights import Adapter
from lorabatch_worker.base_model import BaseModel
from lorabatch_worker.prompt import Preparer
from lorabatch_worker.sequence import Sequence
from tests.models import as_base, claim, tiny_config, tiny_model

TALK = ({"role": "user", "content": "Hi é"},)


@pytest.fixture(scope="module")
def base(tokenizer: Any) -> BaseModel:
    return as_base(tiny_model(tiny_config("llama")), tokenizer)


def prepare(base: BaseModel, template: str | None = None, **fields: Any) -> Sequence:
    adapter = Adapter("a", "version", {}, template)
    fields.setdefault("sampling_params", {"max_new_tokens": 8})
    return Preparer(base).prepare(claim(Job(job_id="j", **fields)), adapter)


def shown(base: BaseModel, sequence: Sequence) -> str:
    return str(base.tokenizer.decode(sequence.prompt))


def test_a_prompt_is_tokenized_as_it_is(base: BaseModel) -> None:
    sequence = prepare(base, "{{ 1 / 0 }}", prompt="Once upon é")
    assert sequence.prompt == base.tokenizer("Once upon é")["input_ids"]
    assert sequence.stop_watch is None


def test_messages_use_the_base_models_template(base: BaseModel) -> None:
    text = shown(base, prepare(base, messages=TALK))
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi é<|im_end|>\n<|im_start|>assistant\n")


def test_the_adapters_own_template_goes_first(base: BaseModel) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} =>"
    assert shown(base, prepare(base, template, messages=TALK)) == "[user] Hi é =>"


def test_a_base_model_with_several_templates_uses_its_default(base: BaseModel) -> None:
    import copy

    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = {"default": "D{{ messages[0].content }}", "rag": "R"}
    several = replace(base, tokenizer=tokenizer)
    assert shown(several, prepare(several, messages=TALK)) == "DHi é"
    assert shown(several, prepare(several, "own", messages=TALK)) == "own"


@pytest.mark.parametrize(
    ("template", "error", "words"),
    [
        ("{% for %}", InvalidAdapter, "template is broken"),
        ("{{ raise_exception('no system role') }}", InvalidJob, "no system role"),
        ("{{ messages[7].content }}", InvalidJob, "refuses these messages"),
        ("{{ 1 / 0 }}", InvalidJob, "division by zero"),
        ("{{ messages[0].content.index('zzz') }}", InvalidJob, "substring not found"),
        ("{% for i in range(1000000000) %}x{% endfor %}", InvalidJob, "Range too big"),
        ("{{ ''.__class__.__mro__ }}", InvalidJob, "unsafe"),
        ("{% include '/etc/hostname' %}", InvalidJob, "refuses these messages"),
        ("{{ messages[0] + 1 }}", InvalidJob, "refuses these messages"),
        ("{%- macro f() %}{{ f() }}{% endmacro %}{{ f() }}", InvalidJob, "recursion"),
    ],
)
def test_a_template_that_fails_fails_its_job(
    base: BaseModel, template: str, error: type[LoraBatchError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        prepare(base, template, messages=TALK)
    assert str(caught.value).startswith("job 'j': ")


def test_a_template_that_renders_to_nothing_is_refused(base: BaseModel) -> None:
    with pytest.raises(InvalidJob, match="job 'j': the prompt has no tokens"):
        prepare(base, "{% if false %}x{% endif %}", messages=TALK)


def test_messages_without_any_template_are_refused(base: BaseModel) -> None:
    import copy

    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(InvalidJob, match="neither the adapter nor the base model"):
        prepare(replace(base, tokenizer=tokenizer), messages=TALK)


@pytest.mark.parametrize(("new", "fits"), [(250, True), (251, False), (131_072, False)])
def test_prompt_and_output_must_fit_the_context(base: BaseModel, new: int, fits: bool) -> None:
    text = " a" * 6
    fields = {"prompt": text, "sampling_params": {"max_new_tokens": new}}
    if fits:
        assert prepare(base, **fields).max_length == 256
        return
    with pytest.raises(PromptTooLong) as caught:
        prepare(base, **fields)
    for word in ("'j'", "6 prompt tokens", str(new), str(6 + new), "256", "MAX_CONTEXT_TOKENS"):
        assert word in str(caught.value)


def test_stop_strings_make_a_watch(base: BaseModel) -> None:
    sequence = prepare(base, prompt="x", sampling_params={"stop": "END", "max_new_tokens": 1})
    assert sequence.stop_watch is not None


def test_a_bias_is_of_a_token_that_the_model_has(base: BaseModel) -> None:
    last = base.model.config.vocab_size - 1
    fitting = prepare(
        base, prompt="a", sampling_params={"logit_bias": {str(last): -100}, "max_new_tokens": 8}
    )
    assert fitting.params.logit_bias == {last: -100.0}
    wanted = f"job 'j': logit_bias has token {last + 1}, wanted one that the model has, 0 to {last}"
    one = {"max_new_tokens": 8}
    with pytest.raises(InvalidJob, match=wanted):
        prepare(base, prompt="a", sampling_params={**one, "logit_bias": {"0": 1, str(last + 1): 1}})


def test_each_text_of_a_job_watches_for_its_own_end(base: BaseModel) -> None:
    params = {"n": 3, "temperature": 1.0, "stop": ["x"], "max_new_tokens": 8}
    first = prepare(base, prompt="a", sampling_params=params)
    members = first.family.members
    assert (first.number, len(members)) == (0, 3)
    assert len({id(one.stop_watch) for one in members} - {id(None)}) == 3
    assert {tuple(one.prompt) for one in members} == {tuple(first.prompt)}
