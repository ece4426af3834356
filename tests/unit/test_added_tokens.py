"""Adapters with tokens of their own, mixed with all others: logits and tokens are PEFT's."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorabatch import Job
from lorabatch.errors import InvalidAdapter
from lorabatch_worker.adapters.base_tokenizer import BaseTokenizer
from lorabatch_worker.adapters.vocabulary import VocabularyChange
from lorabatch_worker.adapters.weights import Adapter, read_adapter
from lorabatch_worker.sampler import UNSOUND, Draw
from lorabatch_worker.sequence import Sequence
from tests import bad_adapters
from tests.added_tokens import add_tokens, word_tokenizer, write_tokenizer
from tests.bad_adapters.tokens import grown
from tests.models import (
    assert_same_logits,
    claim,
    eager,
    generate,
    load_adapter,
    load_with_peft,
    random_adapter,
    resized,
    runner_of,
    small_vocabulary,
    tiny_model,
)

NEW = 6
BASE = 256
BOTH_ENDS = ["embed_tokens", "lm_head"]
PLAIN = {"target_modules": ["q_proj", "v_proj"]}
LORA = {"target_modules": ["q_proj", *BOTH_ENDS]}
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "both ends": (260, {"modules_to_save": BOTH_ENDS}),
    "both ends, and what they were": (257, {"modules_to_save": BOTH_ENDS, "save_embedding": True}),
    "resized alone": (272, {**PLAIN, "save_embedding": True}),
    "LoRA of both": (261, {**LORA, "save_embedding": True}),
    "tokens": (259, {"trainable_token_indices": {n: [7, 256, 257, 258] for n in BOTH_ENDS}}),
    "fewer": (250, {"modules_to_save": BOTH_ENDS}),
    "LoRA of fewer": (248, {**LORA, "save_embedding": True}),
    "as many": (256, {"modules_to_save": BOTH_ENDS}),
    "LoRA": (256, {"r": 8}),
}
TIED = {
    "LoRA of the embedding": (260, {"target_modules": ["embed_tokens"], "save_embedding": True}),
    "LoRA of the head": (258, {"target_modules": ["lm_head"], "save_embedding": True}),
    "one for both": (258, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "one, and what it was": (258, {"modules_to_save": ["embed_tokens"], "save_embedding": True}),
    "tokens, and what they were": (
        258,
        {**PLAIN, "trainable_token_indices": [256, 257], "save_embedding": True},
    ),
}
WORDS = BaseTokenizer(lambda: word_tokenizer(248))


def written(model: Any, folder: Path, size: int, seed: int, **fields: Any) -> Path:
    path = random_adapter(resized(model, size), folder, seed, **fields)
    new = [f"<{n}>" for n in range(248, size)]
    write_tokenizer(path, add_tokens(word_tokenizer(248), new))
    return path


def assert_equals_peft(found: Tensor, model: Any, folder: Path, size: int, prompt: Any) -> None:
    """[new, width] of one adapter."""
    tokens = found.argmax(-1).tolist()
    reference = load_with_peft(resized(model, size), folder)
    wanted = eager(reference, prompt, tokens)
    assert_same_logits(found[:, :size], wanted)
    assert torch.equal(found[:, size:], torch.full_like(found[:, size:], -torch.inf))
    assert tokens == wanted.argmax(-1).tolist()


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "blocks"])
@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("gemma3_text", True)]
)
def test_added_tokens_equal_peft(kind: str, tied: bool, rows: bool, tmp_path: Path) -> None:
    model = tiny_model(small_vocabulary(kind, tie_word_embeddings=tied))
    kinds = KINDS | (TIED if tied else {})
    runner = runner_of(copy.deepcopy(model), slots=len(kinds), rows=rows)
    folders = []
    for slot, (name, (size, fields)) in enumerate(kinds.items()):
        folders.append(written(model, tmp_path / name, size, slot, **fields))
        load_adapter(runner, folders[slot], slot, WORDS)
    sizes = [BASE, *(size for size, _ in kinds.values())]
    prompts = [[5 + n, 9, size - 1, 31, size - 2, *range(3 * n)] for n, size in enumerate(sizes)]
    mixed = generate(runner, prompts, range(-1, len(kinds)), NEW, 7)
    assert mixed.shape[-1] == max(sizes)
    alone_base = generate(runner, prompts[:1], [-1], NEW, 7)[0]
    assert torch.equal(mixed[0, :, :BASE], alone_base)
    assert torch.equal(mixed[0, :, BASE:], torch.full((NEW, max(sizes) - BASE), -torch.inf))
    assert any((row.argmax(-1) >= BASE).any() for row in mixed[1:])  # added tokens are made, too
    for slot, folder in enumerate(folders):
        size, prompt = sizes[slot + 1], prompts[slot + 1]
        assert_equals_peft(mixed[slot + 1], model, folder, size, prompt)
        alone = generate(runner, [prompt], [slot], NEW, 7)[0]
        assert torch.equal(mixed[slot + 1, :, : alone.shape[-1]], alone)


def test_a_model_that_bends_its_logits_makes_nobody_elses_tokens(tmp_path: Path) -> None:
    """Of gemma2: tanh makes a number of -infinity."""
    model = tiny_model(small_vocabulary("gemma2", final_logit_softcapping=3.0))
    runner = runner_of(copy.deepcopy(model))
    folder = written(model, tmp_path, 260, 0, modules_to_save=BOTH_ENDS)
    load_adapter(runner, folder, 0, WORDS)
    prompts = [[5, 9, 8], [5, 259, 8]]
    base, own = generate(runner, prompts, [-1, 0], NEW, 7)
    assert base[:, BASE:].isneginf().all()
    assert_equals_peft(own, model, folder, 260, prompts[1])


# -- the file's tokenizer ------------------------------------------------------


def tokens_of(folder: Path) -> dict[str, int]:
    adapter = read_adapter("x", folder, bad_adapters.TARGET)
    return {} if adapter.tokenizer is None else adapter.tokenizer.get_added_vocab()


@pytest.mark.parametrize(
    ("rows", "new", "wanted"),
    [(11, "<a> <b>", {"<a>": 9, "<b>": 10}), (16, "<a>", {"<a>": 9}), (16, "", {})],
    ids=["added", "padded", "padding alone"],
)
def test_what_an_adapter_adds(rows: int, new: str, wanted: dict[str, int], tmp_path: Path) -> None:
    grown(rows, new=new)(tmp_path)
    assert tokens_of(tmp_path) == wanted
    adapter = read_adapter("x", tmp_path, bad_adapters.TARGET)
    assert adapter.vocabulary_size == rows
    assert adapter.nbytes > 2 * rows * 32 * 4


def test_a_tokenizer_that_adds_nothing_is_not_used(tmp_path: Path) -> None:
    bad_adapters.write(tmp_path)
    before = read_adapter("x", tmp_path, bad_adapters.TARGET).version
    odd = {"model": {"type": "WordLevel", "vocab": {"x": 0}}, "normalizer": {"type": "NFC"}}
    write_tokenizer(tmp_path, word_tokenizer(9), **odd)
    assert tokens_of(tmp_path) == {}
    assert read_adapter("x", tmp_path, bad_adapters.TARGET).version != before


@pytest.mark.parametrize(
    ("pre_tokenizer", "difference"),
    [
        ({"type": "Whitespace"}, None),
        ({"type": "Whitespace", "of_a_later_version": True}, None),
        ({"type": "WhitespaceSplit"}, "pre_tokenizer"),
        (None, "pre_tokenizer"),
    ],
)
def test_what_versions_of_the_library_add_is_no_difference(
    pre_tokenizer: dict[str, Any] | None, difference: str | None
) -> None:
    fields = json.loads(word_tokenizer(4).backend_tokenizer.to_str())
    base = BaseTokenizer(lambda: word_tokenizer(4))
    assert base.first_difference({**fields, "pre_tokenizer": pre_tokenizer}) == difference


def test_a_token_for_padding_needs_no_row(tmp_path: Path) -> None:
    """Many scripts add one and train nothing of it."""
    bad_adapters.write(tmp_path)
    tokenizer = word_tokenizer(9)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    write_tokenizer(tmp_path, tokenizer)
    assert tokens_of(tmp_path) == {}
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": None}))
    with pytest.raises(InvalidAdapter, match=r"'\[PAD\]' as token 9"):
        tokens_of(tmp_path)


def test_tokens_within_the_models_rows(tmp_path: Path) -> None:
    """Models may have rows that their tokenizer names no token for."""
    bad_adapters.write(tmp_path)
    write_tokenizer(tmp_path, add_tokens(word_tokenizer(7), ["<a>"], ["<b>"]))
    target = replace(bad_adapters.TARGET, tokenizer=BaseTokenizer(lambda: word_tokenizer(7)))
    adapter = read_adapter("x", tmp_path, target)
    assert (adapter.vocabulary, adapter.vocabulary_size) == (None, None)
    assert adapter.tokenizer.decode([3, 7, 8, 4], skip_special_tokens=True) == "t3 <a> t4"


# -- draws ---------------------------------------------------------------------


PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9},
    {"temperature": 2.0, "top_k": 400, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.01, "repetition_penalty": 1.3},
    {"frequency_penalty": 0.5, "presence_penalty": 0.5},
]


def row_of(seed: int, size: int | None) -> Sequence:
    params = {"seed": seed, **PARAMS[seed % len(PARAMS)]}
    change = None if size is None else VocabularyChange(size=size)
    adapter = Adapter("a", "version", {}, None, change)
    job = Job(job_id=f"j{seed}", prompt="-", sampling_params=params)
    return Sequence(claim(job), [1, 2], adapter, None, output=[3, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draw_does_not_depend_on_the_others_vocabularies(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = [None, 333, None, 301, 257, None, 333, 128] * 5
    rows = [row_of(seed, size) for seed, size in enumerate(sizes)]
    logits = torch.randn(len(rows), 333).to(dtype)
    for row, size in zip(logits, sizes, strict=True):
        row[size or 300 :] = -torch.inf
    mixed = Draw(logits.clone(), rows, 300).wait()
    for number, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        alone = Draw(logits[number : number + 1, : size or 300].clone(), [row], 300).wait()
        assert alone == [mixed[number]]
        assert mixed[number] < (size or 300)
    logits[3, 7] = torch.nan
    logits[8] = -torch.inf
    assert [i for i, t in enumerate(Draw(logits, rows, 300).wait()) if t == UNSOUND] == [3, 8]
