"""What an adapter changes at a model's two ends: the embedding, and the output head beside LoRA.

    LoRA of an embedding       y = gain * (y + scale * A[:, token] B^T)
    trainable tokens           some tokens have another row; where head and embedding are one
                               weight, another logit, too
    modules_to_save            another weight altogether, of as many tokens

Tensors come in the engine's dtype. Raises InvalidAdapter, UnsupportedAdapter.
Does not cover: added tokens; LoRA of the head, which is that of any linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorabatch.errors import InvalidAdapter, UnsupportedAdapter, shown
from lorabatch_worker.adapters.config import AdapterConfig
from lorabatch_worker.linear import BLOCK

__all__ = ["Ends", "TokenRows", "VocabularyChange", "read_vocabulary"]


@dataclass(frozen=True, eq=False)
class Ends:
    """The two ends of the base model, by module name: `weight` [vocabulary, hidden] of the
    embedding; `tied`: the head has the same."""

    embedding: str
    head: str | None
    tied: bool
    weight: Tensor
    head_has_bias: bool = False


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows [n, hidden] of the tokens `ids` int64 [n], which ascend."""

    ids: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class VocabularyChange:
    """a [vocabulary, rank] and b [rank, hidden] are LoRA's of the embedding, gain [hidden] DoRA's,
    less 1; `embedding` and `head` [vocabulary, hidden] stand in place of the base's, `tokens` and
    `head_tokens` in place of some rows of these."""

    a: Tensor | None = None
    b: Tensor | None = None
    gain: Tensor | None = None
    tokens: TokenRows | None = None
    embedding: Tensor | None = None
    head: Tensor | None = None
    head_tokens: TokenRows | None = None

    @property
    def tensors(self) -> list[Tensor]:
        found = [self.a, self.b, self.gain, self.embedding, self.head]
        for some in {id(some): some for some in (self.tokens, self.head_tokens)}.values():
            found += [some.ids, some.rows] if some else []
        return [tensor for tensor in found if tensor is not None]

    def to(self, device: torch.device) -> VocabularyChange:
        """On a device; the same where it is there."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        def rows(some: TokenRows | None) -> TokenRows | None:
            return some and TokenRows(some.ids.to(device), some.rows.to(device))

        return VocabularyChange(
            moved(self.a),
            moved(self.b),
            moved(self.gain),
            rows(self.tokens),
            moved(self.embedding),
            moved(self.head),
            rows(self.head_tokens),
        )

    def embed(self, ids: Tensor, y: Tensor, scale: Tensor | float) -> Tensor:
        """ids [n], and what the base makes of them, y [n, hidden], which is `scale` times its
        weight's rows: what the adapter makes of them."""
        if self.embedding is not None:
            y = self.embedding[ids] * scale
        if self.tokens is not None:
            at = torch.searchsorted(self.tokens.ids, ids).clamp_(max=len(self.tokens.ids) - 1)
            own = (self.tokens.ids[at] == ids)[:, None]
            y = torch.where(own, self.tokens.rows[at] * scale, y)
        if self.gain is not None:
            y = y + y * self.gain
        if self.a is not None and self.b is not None:
            y = y + _by_row(self.a[ids], self.b) * scale
        return y

    def logits(self, h: Tensor, logits: Tensor) -> Tensor:
        """Of hidden states h [n, hidden] and the logits [n, vocabulary] of the base and of LoRA."""
        if self.head is not None:
            return _by_row(h, self.head.t())
        if self.head_tokens is not None:
            own = _by_row(h, self.head_tokens.rows.t())
            return logits.index_copy(1, self.head_tokens.ids, own)
        return logits


def _by_row(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, in] times weight [in, out]. On a CPU a row does not depend on the others, not even in
    rounding."""
    if x.device.type != "cpu" or len(x) < 2:
        return x @ weight
    return torch.stack([row[None] @ weight for row in x]).flatten(0, 1)


def read_vocabulary(
    found: Mapping[str, Mapping[str, str]],
    tensor: Callable[[str], Tensor],
    ready: Callable[[Tensor, str], Tensor],
    config: AdapterConfig,
    ends: Ends | None,
    max_rank: int,
) -> VocabularyChange | None:
    """`found`: {module: {part: key}} of the two ends, of which it takes what is no LoRA of the
    head. `ready`: what checks a tensor's values and gives it as the engine needs it."""
    if ends is None:
        return None
    made: dict[str, Any] = {}
    for module, whole, some in (
        (ends.embedding, "embedding", "tokens"),
        (ends.head or "", "head", "head_tokens"),
    ):
        parts = found.get(module, {})
        if "weight" in parts:
            key = parts["weight"]
            made[whole] = ready(_sized(tensor(key), list(ends.weight.shape), key), key)
        if "trainable_tokens_delta" in parts:
            key = parts["trainable_tokens_delta"]
            made[some] = _token_rows(tensor(key), key, config.tokens_of(module), ready, ends)
    _check_lora(ends.embedding, found.get(ends.embedding, {}), config)
    if "lora_embedding_A" in found.get(ends.embedding, {}):
        made |= _lora(found[ends.embedding], tensor, ready, config, ends, max_rank)
    if "tokens" in made and ends.tied:
        made.setdefault("head_tokens", made["tokens"])
    at_head = "head" in made or "head_tokens" in made
    if at_head and ends.head_has_bias:
        raise UnsupportedAdapter(f"not supported: other rows of {ends.head}, which has a bias")
    if at_head and "lora_A" in found.get(ends.head or "", {}):
        raise UnsupportedAdapter(
            f"LoRA of {ends.head} beside other rows of it, where both change the same logits"
        )
    return VocabularyChange(**made) if made else None


def _check_lora(module: str, parts: Collection[str], config: AdapterConfig) -> None:
    lora = "lora_embedding_A" in parts
    wanted = {"lora_embedding_B": lora, "lora_magnitude_vector": lora and config.use_dora}
    for part, needed in wanted.items():
        if needed != (part in parts):
            others = " and ".join(sorted(set(parts) - {part})) or "nothing"
            raise InvalidAdapter(
                f"{module}: {others + ' without' if needed else 'beside ' + others + ' there is'} "
                f"{part}, where the config has use_dora {config.use_dora}"
            )


def _sized(tensor: Tensor, wanted: list[int], key: str) -> Tensor:
    if list(tensor.shape) != wanted:
        hint = "; added tokens are not supported" if tensor.dim() == 2 else ""
        raise UnsupportedAdapter(f"{key} is {list(tensor.shape)}, wanted {wanted}{hint}")
    return tensor


def _token_rows(
    rows: Tensor,
    key: str,
    tokens: Sequence[int],
    ready: Callable[[Tensor, str], Tensor],
    ends: Ends,
) -> TokenRows:
    vocabulary, hidden = ends.weight.shape
    beyond = [token for token in tokens if not 0 <= token < vocabulary]
    if beyond or not tokens or len(set(tokens)) < len(tokens):
        seen = f"has token {shown(beyond[0])}" if beyond else "is empty or has a token twice"
        raise InvalidAdapter(
            f"trainable_token_indices {seen}, wanted different tokens in 0..{vocabulary - 1}"
        )
    ids = torch.tensor(list(tokens), dtype=torch.int64)
    if list(rows.shape) != [len(ids), hidden]:
        raise InvalidAdapter(
            f"{key} is {list(rows.shape)}, wanted {[len(ids), hidden]} (trainable_token_indices of "
            "the config)"
        )
    order = ids.argsort()
    return TokenRows(ids[order], ready(rows[order], key))


@torch.inference_mode()
def _lora(
    parts: Mapping[str, str],
    tensor: Callable[[str], Tensor],
    ready: Callable[[Tensor, str], Tensor],
    config: AdapterConfig,
    ends: Ends,
    max_rank: int,
) -> dict[str, Tensor]:
    keys = parts["lora_embedding_A"], parts["lora_embedding_B"]
    rank, scale = config.rank_of(ends.embedding), config.scaling_of(ends.embedding)
    if rank > max_rank:
        raise InvalidAdapter(
            f"{keys[0]} has rank {rank}, allowed {max_rank}: raise LORABATCH_MAX_ADAPTER_RANK"
        )
    vocabulary, hidden = ends.weight.shape
    a, b = (tensor(key).float() for key in keys)
    for key, one, wanted in zip(keys, (a, b), ([rank, vocabulary], [hidden, rank]), strict=True):
        if list(one.shape) != wanted:
            raise InvalidAdapter(f"{key} is {list(one.shape)}, wanted {wanted} (rank {rank})")
    a, b, made = a.t(), b.t() * scale, {}
    if "lora_magnitude_vector" in parts:
        key = parts["lora_magnitude_vector"]
        magnitude = tensor(key).float()
        if list(magnitude.shape) != [hidden]:
            raise InvalidAdapter(f"{key} is {list(magnitude.shape)}, wanted {[hidden]}")
        squares = torch.zeros(hidden, dtype=torch.float64)
        for first in range(0, vocabulary, BLOCK):
            rows = ends.weight[first : first + BLOCK].float().cpu() + a[first : first + BLOCK] @ b
            squares += rows.double().square().sum(0)
        gain = magnitude / squares.sqrt().float()
        made["gain"] = ready(gain - 1, key)
        b = b * gain
    return {"a": ready(a, keys[0]), "b": ready(b, keys[1]), **made}
