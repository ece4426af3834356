"""From a job to a sequence: the chat template if there are messages, the tokenizer, the defaults.

Messages are rendered by the adapter's own chat template, in a process of its own and under bounds
(adapters/render.py), else by the base model's. A plain prompt is tokenized as it is, with the
tokenizer's own special tokens. The tokenizer is the base model's, or that of an adapter that adds
tokens. Sampling parameters that the job leaves out are the adapter's, if it ships some; its end
tokens come beside the base model's. What the text must be like becomes a grammar (grammars.py).
Raises InvalidJob, InvalidAdapter, PromptTooLong. Thread-safe.
"""

from __future__ import annotations

import threading
from typing import Any

import jinja2

from lorabatch.errors import InvalidJob, PromptTooLong
from lorabatch.job import Job, SamplingParams
from lorabatch.ledger import Claim
from lorabatch_worker.adapters.defaults import GenerationDefaults
from lorabatch_worker.adapters.render import TOOLLESS, TemplateRenderer
from lorabatch_worker.adapters.weights import Adapter
from lorabatch_worker.base_model import BaseModel
from lorabatch_worker.grammar_text import grammar_text
from lorabatch_worker.grammars import Grammars
from lorabatch_worker.sequence import Family, Sequence
from lorabatch_worker.stop import StopWatch

__all__ = ["Preparer"]


class Preparer:
    """Makes sequences of jobs for one base model."""

    def __init__(self, base: BaseModel, renderer: TemplateRenderer | None = None) -> None:
        self._base = base
        self._renderer = TemplateRenderer() if renderer is None else renderer
        self._grammars = Grammars()
        self._lock = threading.Lock()  # fast tokenizers refuse to be used while being changed

    def close(self) -> None:
        """End the processes that render adapters' templates and try grammars."""
        self._renderer.close()
        self._grammars.close()

    def prepare(self, claim: Claim, adapter: Adapter | None) -> Sequence:
        """The first of the job's sequences."""
        job = claim.job
        own = adapter.chat_template if adapter else None
        rendered = None
        if job.messages is not None and own:
            # Which may take seconds: not under the lock.
            rendered = self._render_own(job, own, adapter)
        tokenizer = self._base.tokenizer_for(adapter)
        with self._lock:
            ids = _tokens(job, rendered, tokenizer)
        longest = self._base.max_context_tokens
        defaults = adapter.defaults if adapter else None
        params = job.sampling_params
        if defaults is not None:
            params = defaults.complete(params, longest - len(ids))
        wanted = len(ids) + params.max_new_tokens
        if wanted > longest:
            raise PromptTooLong(
                f"job {job.job_id!r}: {len(ids)} prompt tokens + max_new_tokens "
                f"{params.max_new_tokens} = {wanted}, allowed {longest}; shorten the "
                "prompt, lower max_new_tokens or raise LORABATCH_MAX_CONTEXT_TOKENS"
            )
        end_ids = frozenset[int]()
        if defaults is not None:
            with self._lock:
                end_ids = _end_ids(tokenizer, defaults, job.sampling_params)
        _check_bias(job, self._base.vocabulary_of(adapter) if params.logit_bias else 0)

        constraint, grammar = grammar_text(job), None
        if constraint is not None:
            ends = self._base.eos_ids | end_ids
            grammar = self._grammars.grammar_of(job.job_id, constraint, tokenizer, ends)

        def one() -> Sequence:
            watch = StopWatch(tokenizer, params.stop) if params.stop else None
            return Sequence(
                *(claim, ids, adapter, watch),
                effective=params,
                end_ids=end_ids,
                grammar=grammar and grammar.copy(),
            )

        return Family.of(params.candidates, one).members[0]

    def _render_own(self, job: Job, template: str, adapter: Adapter | None) -> str:
        with self._lock:
            special = self._base.tokenizer_for(adapter).special_tokens_map
        messages = [m.for_template() for m in job.messages or ()]
        tools = [tool.for_template() for tool in job.tools or ()]
        return self._renderer.render(job.job_id, template, messages, special, tools)


def _tokens(job: Job, rendered: str | None, tokenizer: Any) -> list[int]:
    if job.messages is None:
        ids = tokenizer(job.prompt)["input_ids"]
    else:
        text = _render(job, tokenizer) if rendered is None else rendered
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InvalidJob(f"job {job.job_id!r}: the prompt has no tokens; give it some text")
    return list(ids)


def _check_bias(job: Job, vocabulary: int) -> None:
    highest = max(job.sampling_params.logit_bias, default=-1)
    if highest >= vocabulary and highest >= 0:
        raise InvalidJob(
            f"job {job.job_id!r}: logit_bias has token {highest}, wanted one that the model has, "
            f"0 to {vocabulary - 1}; leave it out"
        )


def _render(job: Job, tokenizer: Any) -> str:
    """By the base model's template, which is the operator's."""
    if not tokenizer.chat_template:
        raise InvalidJob(
            f"job {job.job_id!r}: has messages, but neither the adapter nor the base model has "
            "a chat template; send a prompt"
        )
    messages = [m.for_template() for m in job.messages or ()]
    tools = [tool.for_template() for tool in job.tools or ()]

    def rendered(**more: Any) -> str:
        form = {"tokenize": False, "add_generation_prompt": True}
        return str(tokenizer.apply_chat_template(messages, **form, **more))

    try:
        text = rendered(tools=tools) if tools else rendered()
        ignored = bool(tools) and text == rendered()
    except jinja2.TemplateSyntaxError as error:
        raise InvalidJob(f"job {job.job_id!r}: the chat template is broken: {error}") from None
    except Exception as error:  # noqa: BLE001 - a template can raise anything, 1/0 included
        raise InvalidJob(
            f"job {job.job_id!r}: the chat template refuses these messages: {error}"
        ) from None
    if ignored:
        raise InvalidJob(f"job {job.job_id!r}: tools: {TOOLLESS.format('base model')}")
    return text


def _end_ids(tokenizer: Any, defaults: GenerationDefaults, given: SamplingParams) -> frozenset[int]:
    """The adapter's end tokens. A stop string of its own that is a special token is one of them: it
    is not part of the text, so that no stop string finds it."""
    found = set(defaults.end_ids)
    if defaults.end_token is not None:
        found |= _token_ids(tokenizer, defaults.end_token)
    if "stop" not in given.model_fields_set:
        for text in defaults.params.get("stop", ()):
            added = tokenizer.added_tokens_decoder
            found |= {i for i in _token_ids(tokenizer, text) if i in added and added[i].special}
    return frozenset(found)


def _token_ids(tokenizer: Any, text: str) -> set[int]:
    """The token that is this text; none if the text is not one token."""
    token = tokenizer.convert_tokens_to_ids(text)
    known = token is not None and tokenizer.convert_ids_to_tokens(token) == text
    return {token} if known else set()
