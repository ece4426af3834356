"""The tensors of the model's two ends in an adapter's file: how many tokens they are for, and what
they change there.

An adapter that was trained after `resize_token_embeddings` has rows for another number of tokens
than the base. The file must then hold the rows of all tokens that the base does not have, of both
ends: as weights (modules_to_save, or save_embedding_layers) or as trained tokens. Raises
InvalidAdapter, UnsupportedAdapter. Does not cover: the tokens themselves (tokenizer.py); DoRA of an
end that has other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorabatch.errors import InvalidAdapter, UnsupportedAdapter, shown
from lorabatch_worker.adapters.config import AdapterConfig
from lorabatch_worker.adapters.vocabulary import Ends, TokenRows, VocabularyChange
from lorabatch_worker.linear import BLOCK

__all__ = ["EndTensors", "vocabulary_size"]

MAX_ADDED_TOKENS = 1 << 15  # in a step with such an adapter all logits are as wide as its own
TOKEN_AXES = {"weight": 0, "base_weight": 0, "lora_embedding_A": 1, "lora_B": 0}
HEAD_LORA = {"lora_A", "lora_B", "base_weight"}
Found = Mapping[str, Mapping[str, str]]


def vocabulary_size(
    found: Found, shape: Callable[[str], list[int]], config: AdapterConfig, ends: Ends
) -> int:
    """How many token ids the adapter has. `found`: {module: {part: key}}."""
    sizes: dict[str, int] = {}
    for parts in (found.get(ends.embedding, {}), found.get(ends.head or "", {})):
        for part, axis in TOKEN_AXES.items():
            if part in parts and len(shape(parts[part])) == 2:
                sizes[parts[part]] = shape(parts[part])[axis]
    if len(set(sizes.values())) > 1:
        (one, rows), (other, others) = (f(sizes.items(), key=lambda kv: kv[1]) for f in (min, max))
        raise InvalidAdapter(
            f"{other} is for {others} tokens, but {one} for {rows}; wanted as many at both ends of "
            "the model: save both after resize_token_embeddings"
        )
    size = next(iter(sizes.values()), ends.vocabulary)
    if not sizes:
        trained = [*config.tokens_of(ends.embedding), *config.tokens_of(ends.head or "")]
        with_rows = any("trainable_tokens_delta" in parts for parts in found.values())
        size = max([size, *(token + 1 for token in trained if with_rows)])
    if size - ends.vocabulary > MAX_ADDED_TOKENS:
        what = next(iter(sizes), f"trainable_token_indices has token {size - 1} and")
        raise InvalidAdapter(
            f"{what} is for {shown(size)} tokens, the base model has {ends.vocabulary}; wanted at "
            f"most {MAX_ADDED_TOKENS} added ones"
        )
    return size


@dataclass(frozen=True)
class EndTensors:
    """Reads them. `ready`: what checks a tensor's values and gives it as the engine needs it;
    `size`: token ids that the adapter has."""

    tensor: Callable[[str], Tensor]
    ready: Callable[[Tensor, str], Tensor]
    config: AdapterConfig
    ends: Ends
    max_rank: int
    size: int

    def read(self, found: Found) -> VocabularyChange | None:
        """`found`: {module: {part: key}} of the adapter, of which it takes what is of the two ends,
        but LoRA of a head with the base's rows."""
        ends, made = self.ends, dict[str, Any]()
        at_embedding, at_head = found.get(ends.embedding, {}), found.get(ends.head or "", {})
        for module, parts, whole, some in (
            (ends.embedding, at_embedding, "embedding", "tokens"),
            (ends.head or "", at_head, "head", "head_tokens"),
        ):
            key = parts.get("weight") or (self._grown and parts.get("base_weight"))
            if key:
                made[whole] = self.ready(self._sized(key), key)
            if "trainable_tokens_delta" in parts:
                made[some] = self._token_rows(parts["trainable_tokens_delta"], module)
        self._check_lora(at_embedding)
        if "lora_embedding_A" in at_embedding:
            made |= self._lora(at_embedding)
        if ends.tied and "tokens" in made and "weight" not in at_head:
            made.setdefault("head_tokens", made["tokens"])
        if ends.tied and self._grown:  # one weight before either was trained
            if "base_weight" in at_embedding:
                made.setdefault("head", made["embedding"])
            if "base_weight" in at_head:
                made.setdefault("embedding", made["head"])
        self._check_head(made, at_head)
        if self.size != ends.vocabulary:
            made |= self._resized(made, at_head)
        return VocabularyChange(**made) if made else None

    @property
    def _grown(self) -> bool:
        return self.size > self.ends.vocabulary

    def _check_head(self, made: Mapping[str, Any], parts: Collection[str]) -> None:
        head = self.ends.head
        changed = "head" in made or "head_tokens" in made
        if (changed or self.size != self.ends.vocabulary) and self.ends.head_has_bias:
            raise UnsupportedAdapter(f"not supported: other rows of {head}, which has a bias")
        if ("weight" in parts or "head_tokens" in made) and "lora_A" in parts:
            raise UnsupportedAdapter(
                f"LoRA of {head} beside other rows of it, where both change the same logits"
            )

    def _resized(self, made: Mapping[str, Any], at_head: Mapping[str, str]) -> dict[str, Any]:
        """What is made of an adapter with another number of tokens: all rows must be known."""
        ends = self.ends
        for module, whole, some in (
            (ends.embedding, "embedding", "tokens"),
            (ends.head, "head", "head_tokens"),
        ):
            ids = set(made[some].ids.tolist()) if some in made else set()
            lacking = sorted(set(range(ends.vocabulary, self.size)) - ids)
            if lacking and whole not in made:
                raise UnsupportedAdapter(
                    f"it is for {self.size} tokens, the base model has {ends.vocabulary}, but the "
                    f"file has no row of {module} for token {lacking[0]}: save embedding and head "
                    "after resize_token_embeddings, with save_embedding_layers=True or as "
                    "modules_to_save"
                )
        lora = self._head_lora(at_head) if "lora_A" in at_head or "lora_B" in at_head else {}
        return {"size": self.size, **lora}

    def _head_lora(self, parts: Mapping[str, str]) -> dict[str, Tensor]:
        head = self.ends.head or ""
        beyond = sorted(parts.keys() - HEAD_LORA)
        if beyond or not {"lora_A", "lora_B"} <= parts.keys() or self.config.use_dora:
            raise UnsupportedAdapter(
                f"{head}: {', '.join(sorted(parts))} for {self.size} tokens, where the base model "
                f"has {self.ends.vocabulary}; of such a head only plain LoRA is supported"
            )
        rank, hidden = self._rank(parts["lora_A"], head), self.ends.weight.shape[1]
        a = self._shaped(parts["lora_A"], [rank, hidden])
        b = self._shaped(parts["lora_B"], [self.size, rank]) * self.config.scaling_of(head)
        return {
            "head_a": self.ready(a.t(), parts["lora_A"]),
            "head_b": self.ready(b.t(), parts["lora_B"]),
        }

    def _check_lora(self, parts: Collection[str]) -> None:
        lora, dora = "lora_embedding_A" in parts, self.config.use_dora
        wanted = {"lora_embedding_B": lora, "lora_magnitude_vector": lora and dora}
        for part, needed in wanted.items():
            if needed != (part in parts):
                others = " and ".join(sorted(set(parts) - {part})) or "nothing"
                raise InvalidAdapter(
                    f"{self.ends.embedding}: "
                    f"{others + ' without' if needed else 'beside ' + others + ' there is'} "
                    f"{part}, where the config has use_dora {dora}"
                )

    def _rank(self, key: str, module: str) -> int:
        rank = self.config.rank_of(module)
        if rank > self.max_rank:
            raise InvalidAdapter(
                f"{key} has rank {rank}, allowed {self.max_rank}: raise LORABATCH_MAX_ADAPTER_RANK"
            )
        return rank

    def _shaped(self, key: str, wanted: list[int]) -> Tensor:
        """In fp32."""
        tensor = self.tensor(key).float()
        if list(tensor.shape) != wanted:
            raise InvalidAdapter(f"{key} is {list(tensor.shape)}, wanted {wanted}")
        return tensor

    def _sized(self, key: str) -> Tensor:
        tensor, wanted = self.tensor(key), [self.size, self.ends.weight.shape[1]]
        if list(tensor.shape) != wanted:
            raise UnsupportedAdapter(f"{key} is {list(tensor.shape)}, wanted {wanted}")
        return tensor

    def _token_rows(self, key: str, module: str) -> TokenRows:
        tokens: Sequence[int] = self.config.tokens_of(module)
        rows, hidden = self.tensor(key), self.ends.weight.shape[1]
        beyond = [token for token in tokens if not 0 <= token < self.size]
        if beyond or not tokens or len(set(tokens)) < len(tokens):
            seen = f"has token {shown(beyond[0])}" if beyond else "is empty or has a token twice"
            raise InvalidAdapter(
                f"trainable_token_indices {seen}, wanted different tokens in 0..{self.size - 1}"
            )
        ids = torch.tensor(list(tokens), dtype=torch.int64)
        if list(rows.shape) != [len(ids), hidden]:
            raise InvalidAdapter(
                f"{key} is {list(rows.shape)}, wanted {[len(ids), hidden]} "
                "(trainable_token_indices of the config)"
            )
        order = ids.argsort()
        return TokenRows(ids[order], self.ready(rows[order], key))

    @torch.inference_mode()
    def _lora(self, parts: Mapping[str, str]) -> dict[str, Tensor]:
        """Of the embedding."""
        key_a, key_b = parts["lora_embedding_A"], parts["lora_embedding_B"]
        embedding, hidden = self.ends.embedding, self.ends.weight.shape[1]
        rank, scale = self._rank(key_a, embedding), self.config.scaling_of(embedding)
        a = self._shaped(key_a, [rank, self.size]).t()
        b = self._shaped(key_b, [hidden, rank]).t() * scale
        if "lora_magnitude_vector" not in parts:
            return {"a": self.ready(a, key_a), "b": self.ready(b, key_b)}
        key = parts["lora_magnitude_vector"]
        if self.size != self.ends.vocabulary:
            raise UnsupportedAdapter(
                f"{key}: DoRA of an embedding of {self.size} tokens, where the base model has "
                f"{self.ends.vocabulary}, is not supported"
            )
        gain = self._shaped(key, [hidden]) / _norms(self.ends.weight, a, b)
        return {
            "a": self.ready(a, key_a),
            "b": self.ready(b * gain, key_b),
            "gain": self.ready(gain - 1, key),
        }


def _norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[hidden], of the columns of weight + a b, fp32."""
    squares = torch.zeros(weight.shape[1], dtype=torch.float64)
    for first in range(0, len(weight), BLOCK):
        rows = weight[first : first + BLOCK].float().cpu() + a[first : first + BLOCK] @ b
        squares += rows.double().square().sum(0)
    return squares.sqrt().float()
