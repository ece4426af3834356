"""From a job to tokens: the chat template if there are messages, then the tokenizer.

Messages are rendered by the adapter's own chat template, else the base model's. A plain prompt
is tokenized as it is, with the tokenizer's own special tokens. Raises InvalidJob, InvalidAdapter,
PromptTooLong. Thread-safe.
"""

from __future__ import annotations

import threading

import jinja2

from lorabatch.errors import InvalidAdapter, InvalidJob, PromptTooLong
from lorabatch.job import Job
from lorabatch.ledger import Claim
from lorabatch_worker.adapters.weights import Adapter
from lorabatch_worker.base_model import BaseModel
from lorabatch_worker.sequence import Sequence
from lorabatch_worker.stop import StopWatch

__all__ = ["Preparer"]


class Preparer:
    """Makes sequences of jobs for one base model."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._lock = threading.Lock()  # fast tokenizers refuse to be used while being changed

    def prepare(self, claim: Claim, adapter: Adapter | None) -> Sequence:
        job = claim.job
        with self._lock:
            ids = self._tokens(job, adapter)
        longest = self._base.max_context_tokens
        wanted = len(ids) + job.sampling_params.max_new_tokens
        if wanted > longest:
            raise PromptTooLong(
                f"job {job.job_id!r}: {len(ids)} prompt tokens + max_new_tokens "
                f"{job.sampling_params.max_new_tokens} = {wanted}, allowed {longest}; shorten the "
                "prompt, lower max_new_tokens or raise LORABATCH_MAX_CONTEXT_TOKENS"
            )
        stop = job.sampling_params.stop
        watch = StopWatch(self._base.tokenizer, stop) if stop else None
        return Sequence(claim, ids, adapter, watch)

    def _tokens(self, job: Job, adapter: Adapter | None) -> list[int]:
        tokenizer = self._base.tokenizer
        if job.messages is None:
            ids = tokenizer(job.prompt)["input_ids"]
        else:
            ids = tokenizer(self._render(job, adapter), add_special_tokens=False)["input_ids"]
        if not ids:
            raise InvalidJob(f"job {job.job_id!r}: the prompt has no tokens; give it some text")
        return list(ids)

    def _render(self, job: Job, adapter: Adapter | None) -> str:
        own = adapter.chat_template if adapter else None
        if not (own or self._base.tokenizer.chat_template):
            raise InvalidJob(
                f"job {job.job_id!r}: has messages, but neither the adapter nor the base model has "
                "a chat template; send a prompt"
            )
        messages = [m.model_dump() for m in job.messages or ()]
        try:
            return str(
                self._base.tokenizer.apply_chat_template(
                    messages, chat_template=own, tokenize=False, add_generation_prompt=True
                )
            )
        except jinja2.TemplateSyntaxError as error:
            blamed = InvalidAdapter if own else InvalidJob
            raise blamed(f"job {job.job_id!r}: the chat template is broken: {error}") from None
        except Exception as error:  # noqa: BLE001 - a template can raise anything, 1/0 included
            raise InvalidJob(
                f"job {job.job_id!r}: the chat template refuses these messages: {error}"
            ) from None
