"""From the text of a job's grammar (grammar_text.py) to that of its sequence, by llguidance.

A grammar is tried in a process of its own first (grammar_child.py), under bounds of seconds and
bytes, because it comes from a tenant and its compiler can be brought down by it; then it is
compiled here, for each job anew: copies share the states that their texts go through, of which
there may be so many, and one job would end because of those before it. Remembered is of the last
KEPT grammars that they are sound, and for RETRY_S why not; and the last TOKENIZERS. Raises
InvalidJob, EngineFault. Thread-safe.
"""

from __future__ import annotations

import json
import time
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from lorabatch.errors import InvalidJob
from lorabatch_worker.child import Children
from lorabatch_worker.grammar import WORD, Grammar

__all__ = ["Grammars"]

BOUND_S = 5.0
MEMORY_BYTES = 256 << 20
HELD_BYTES = 16 << 20  # 3,000 properties take 13 MB; each job in hand may hold as much
KEPT = 128
TOKENIZERS = 8  # those of adapters that add tokens, too; one of 49,152 tokens takes 30 MB
RETRY_S = 60.0
SHOWN_CHARS = 300
CHILD = Path(__file__).with_name("grammar_child.py")
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 200_000,  # an enum of 10,000 texts takes over half of it
    "max_lexer_states": 50_000,  # of one job; 1 to 2 KB each
    "precompute_large_lexemes": False,  # it would take the time of all tokens, not just of bytes
    "verbose_errors": False,
}


class _Tried(NamedTuple):
    """`why` it is refused, or None."""

    why: str | None
    at_s: float

    @property
    def is_old(self) -> bool:
        return self.why is not None and time.monotonic() - self.at_s > RETRY_S


class _Vocabulary:
    """A tokenizer as llguidance has it. `end_id`: what ends a text for it; jobs' own end tokens
    differ, and one job's must not be all others'."""

    def __init__(self, tokenizer: Any, end_ids: frozenset[int]) -> None:
        from llguidance.hf import from_tokenizer

        own = tokenizer.eos_token_id
        self.end_id: int = min(end_ids) if own is None else own
        self.tokenizer = from_tokenizer(tokenizer, eos_token=self.end_id)
        self.words = -(-self.tokenizer.vocab_size // WORD)


class Grammars:
    """Of one base model."""

    def __init__(self, bound_s: float = BOUND_S, memory_bytes: int = MEMORY_BYTES) -> None:
        self.bound_s = bound_s
        self._children = Children(CHILD, memory_bytes, "tries grammars")
        self._vocabularies: weakref.WeakKeyDictionary[Any, _Vocabulary] = (
            weakref.WeakKeyDictionary()
        )
        self._tried: OrderedDict[str, _Tried] = OrderedDict()

    def grammar_of(
        self, job_id: str, wanted: tuple[str, str], tokenizer: Any, end_ids: frozenset[int]
    ) -> Grammar:
        """At its beginning. `wanted`: the job's field that asks for it, and its text; `end_ids`:
        the tokens that end the job's sequences."""
        field, text = wanted
        if not end_ids:
            raise InvalidJob(
                f"job {job_id!r}: {field}: the base model has no end token, so that no text could "
                "end; wanted a model with eos_token_id"
            )
        with self._children.lock:
            vocabulary = self._vocabulary_of(tokenizer, end_ids)
            why = self._remembered(job_id, text)
        matcher = _matcher(text, vocabulary) if why is None else None
        why = matcher.get_error() if matcher else why
        if why:
            raise InvalidJob(f"job {job_id!r}: {field}: {' '.join(why.split())[:SHOWN_CHARS]}")
        return Grammar(matcher, vocabulary.words, vocabulary.end_id, end_ids)

    def close(self) -> None:
        """End the child; a grammar that is being tried ends as EngineFault."""
        self._children.close()

    # -- under the lock ------------------------------------------------------

    def _vocabulary_of(self, tokenizer: Any, end_ids: frozenset[int]) -> _Vocabulary:
        """Its own, which is now the one that was used last."""
        found = self._vocabularies.pop(tokenizer, None) or _Vocabulary(tokenizer, end_ids)
        self._vocabularies[tokenizer] = found
        if len(self._vocabularies) > TOKENIZERS:
            del self._vocabularies[next(iter(self._vocabularies))]
        return found

    def _remembered(self, job_id: str, text: str) -> str | None:
        """Why it is refused."""
        tried = self._tried.get(text)
        if tried is None or tried.is_old:
            tried = self._tried[text] = _Tried(self._problem(job_id, text), time.monotonic())
            if len(self._tried) > KEPT:
                self._tried.popitem(last=False)
        self._tried.move_to_end(text)
        return tried.why

    def _problem(self, job_id: str, text: str) -> str | None:
        """What is wrong with it, according to the child."""
        bounds = {"held_bytes": HELD_BYTES, "end_s": 2 * self.bound_s + 1}
        request = {"grammar": text, "limits": LIMITS, **bounds}
        line = json.dumps(request).encode() + b"\n"
        try:
            answer, _ = self._children.answer(job_id, line, self.bound_s)
        except TimeoutError:
            return f"not compiled after {self.bound_s:g} s, which is the bound; make it simpler"
        except EOFError:
            return (
                "it brought down the process that compiles it, twice (bounds: "
                f"{self._children.memory_bytes >> 20} MiB, references a few hundred deep); make it "
                "simpler"
            )
        why: str | None = answer["why"]
        return why


def _matcher(text: str, vocabulary: _Vocabulary) -> Any:
    """llguidance's, which may have an error."""
    import llguidance

    limits = llguidance.LLParserLimits(**LIMITS)
    matcher = llguidance.LLMatcher(vocabulary.tokenizer, text, limits=limits, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()  # or the engine's thread would be the first to
    return matcher
