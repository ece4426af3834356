"""Bad changes of the model's two ends."""

from __future__ import annotations

from typing import Any

import torch

from lorabatch.errors import InvalidAdapter, UnsupportedAdapter
from tests.bad_adapters.good import PREFIX, VOCABULARY, WIDTH, key
from tests.bad_adapters.making import Bad, with_tensors

EMBEDDING = f"{PREFIX}model.embed_tokens"
TOKENS = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
A, B = f"{EMBEDDING}.lora_embedding_A", f"{EMBEDDING}.lora_embedding_B"
LORA = {A: torch.ones(4, VOCABULARY), B: torch.ones(WIDTH, 4)}


def tokens(what: str, ids: Any, rows: int, *words: str) -> Bad:
    made = with_tensors({TOKENS: torch.ones(rows, WIDTH)}, trainable_token_indices=ids)
    return Bad(what, made, InvalidAdapter, ("trainable_token_indices", *words))


ENDS_ROWS: list[Bad] = [
    tokens("trained rows of no token", [], 0, "empty", "0..8"),
    tokens("trained rows of tokens that are not named", None, 2, "empty"),
    tokens("a trained token below zero", [-1], 1, "token -1"),
    tokens("a trained token of 2^70", [1 << 70], 1, "token 1180591620717411303424", "at most"),
    tokens("a trained token twice", [3, 3], 2, "twice"),
    tokens("fewer trained rows than tokens", [3, 4, 5], 2, "[2, 32]", "[3, 32]"),
    tokens("trained tokens that are no numbers", ["a"], 1, "wanted a list of tokens"),
    tokens("trained tokens that are no list", "all", 1, "'all'", "wanted a list"),
    Bad(
        "LoRA of the embedding without B",
        with_tensors({A: LORA[A]}),
        InvalidAdapter,
        ("model.embed_tokens", "without lora_embedding_B"),
    ),
    Bad(
        "LoRA of the embedding without A",
        with_tensors({B: LORA[B]}),
        InvalidAdapter,
        ("model.embed_tokens", "lora_embedding_B"),
    ),
    Bad(
        "LoRA of another vocabulary",
        with_tensors({**LORA, A: torch.ones(4, 10)}),
        UnsupportedAdapter,
        ("for 10 tokens", "has 9", "no row of model.embed_tokens for token 9"),
    ),
    Bad(
        "LoRA of the embedding with too high a rank",
        with_tensors(
            {A: torch.ones(9, VOCABULARY), B: torch.ones(WIDTH, 9)},
            rank_pattern={"embed_tokens": 9},
        ),
        InvalidAdapter,
        (A, "rank 9", "allowed 8", "LORABATCH_MAX_ADAPTER_RANK"),
    ),
    Bad(
        "an embedding with added tokens, and no head",
        with_tensors({f"{EMBEDDING}.weight": torch.ones(12, WIDTH)}),
        UnsupportedAdapter,
        ("for 12 tokens", "has 9", "no row of lm_head for token 9", "save_embedding_layers"),
    ),
    Bad(
        "an embedding of another width",
        with_tensors({f"{EMBEDDING}.weight": torch.ones(VOCABULARY, 5)}),
        UnsupportedAdapter,
        (f"{EMBEDDING}.weight", "[9, 5]", "[9, 32]"),
    ),
    Bad(
        "an embedding that is not finite",
        with_tensors({f"{EMBEDDING}.weight": torch.full((VOCABULARY, WIDTH), torch.nan)}),
        InvalidAdapter,
        (f"{EMBEDDING}.weight", "NaN"),
    ),
    Bad(
        "the embedding of another base",
        with_tensors({f"{EMBEDDING}.base_layer.weight": torch.zeros(VOCABULARY, WIDTH)}),
        UnsupportedAdapter,
        (f"{EMBEDDING}.base_layer.weight", "not the base model's weight"),
    ),
    Bad(
        "the head of another base",
        with_tensors({f"{PREFIX}lm_head.base_layer.weight": torch.zeros(VOCABULARY, WIDTH)}),
        UnsupportedAdapter,
        ("lm_head.base_layer.weight", "not the base model's weight"),
    ),
    Bad(
        "the embedding of a wider base",
        with_tensors({f"{EMBEDDING}.base_layer.weight": torch.ones(VOCABULARY, 33)}),
        UnsupportedAdapter,
        (f"{EMBEDDING}.base_layer.weight", "[9, 33]", "[9, 32]"),
    ),
    Bad(
        "LoRA of a head that is no linear layer",
        with_tensors(
            {key("lm_head", "A"): torch.ones(4, 32), key("lm_head", "B"): torch.ones(9, 4)}
        ),
        UnsupportedAdapter,
        ("lm_head", "no change that can be made"),
    ),
    Bad(
        "LoRA of the head's kind on the embedding",
        with_tensors({f"{EMBEDDING}.lora_A.weight": torch.ones(4, 32)}),
        UnsupportedAdapter,
        (f"{EMBEDDING}.lora_A.weight",),
    ),
]
