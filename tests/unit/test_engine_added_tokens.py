"""Jobs of an adapter that adds tokens, through the whole engine: text with them in and out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorabatch import Job
from tests.added_tokens import add_tokens
from tests.desk import Desk, job, leave_nothing, start
from tests.models import load_with_peft, random_adapter, resized

PROMPT = "Say <q> now"
TEMPLATE = "{% for m in messages %}<q>{{ m.content }}{% endfor %}{{ eos_token }}"
HEAD = "base_model.model.lm_head.weight"
WEIGHTS = "adapter_model.safetensors"


def last_hidden(model: Any, ids: list[int]) -> Tensor:
    """What the head reads at the last token."""
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    hook.remove()
    return seen[0][0, -1]


@torch.no_grad()
def greedy(model: Any, ids: list[int], new: int) -> list[int]:
    made: list[int] = []
    for _ in range(new):
        made.append(int(model(input_ids=torch.tensor([[*ids, *made]])).logits[0, -1].argmax()))
    return made


class Added:
    """An adapter that says <q> after the prompt and then ends, with PEFT's model of it."""

    def __init__(self, base: Path, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        plain = AutoTokenizer.from_pretrained(base)
        self.first = len(plain)
        self.tokenizer = add_tokens(plain, ["<q>"], ["<|done|>"])
        wide = resized(model, self.first + 2)
        ends = ["embed_tokens", "lm_head"]
        self.folder = random_adapter(wide, folder, 3, modules_to_save=ends)
        self.tokenizer.eos_token = "<|done|>"
        self.tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": self.first + 1}))
        ids = self.tokenizer(PROMPT)["input_ids"]
        peft = load_with_peft(resized(model, self.first + 2), folder)
        says, ends_at = last_hidden(peft, ids), last_hidden(peft, [*ids, self.first])
        tensors = load_file(folder / WEIGHTS)
        for row, (own, other) in enumerate([(says, ends_at), (ends_at, says)], self.first):
            tensors[HEAD][row] = 20 * (own - other * (own @ other) / (other @ other))
        save_file(tensors, folder / WEIGHTS)
        self.peft = load_with_peft(resized(model, self.first + 2), folder)


@pytest.fixture(scope="module")
def added(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Added:
    return Added(tiny_folder, tmp_path_factory.mktemp("added"))


@pytest.fixture(scope="module")
def desk(
    added: Added,
    tiny_folder: Path,
    tiny_adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Desk]:
    folders = {**tiny_adapters, "added": added.folder}
    adapters = ",".join(f"{name}={path}" for name, path in folders.items())
    made = start(tiny_folder, tmp_path_factory.mktemp("home"), adapters, adapter_slots=len(folders))
    yield made
    leave_nothing(made.engine)
    made.engine.drain(0)


def test_text_holds_added_tokens_and_an_added_one_ends_it(desk: Desk, added: Added) -> None:
    ids = added.tokenizer(PROMPT)["input_ids"]
    assert added.first in ids
    result = desk.run(job("text", PROMPT, "added", ignore_eos=False))["text"]
    assert (result.error, result.finish_reason, result.text) == (None, "eos_token", "<q>")
    assert result.token_ids == (added.first, added.first + 1)
    assert result.usage.prompt_tokens == len(ids)


def test_a_stop_string_is_found_in_an_added_token(desk: Desk) -> None:
    result = desk.run(job("stops", PROMPT, "added", stop=["q>"]))["stops"]
    assert (result.finish_reason, result.text) == ("stop_sequence", "<")


def test_its_own_template_and_special_tokens(desk: Desk, added: Added) -> None:
    talk = [{"role": "user", "content": "Hi <q>"}]
    params = {"max_new_tokens": 1, "ignore_eos": True}
    chat = Job(job_id="chat", messages=talk, adapter_id="added", sampling_params=params)
    result = desk.run(chat)["chat"]
    ids = added.tokenizer("<q>Hi <q><|done|>", add_special_tokens=False)["input_ids"]
    assert ids[0] == ids[-2] == added.first
    assert ids[-1] == added.first + 1
    assert result.usage.prompt_tokens == len(ids)
    assert list(result.token_ids) == greedy(added.peft, ids, 1)


def test_the_base_model_knows_nothing_of_them(desk: Desk) -> None:
    result = desk.run(job("plain", PROMPT, max_new_tokens=1))["plain"]
    assert result.usage.prompt_tokens == len(desk.engine.base.tokenizer(PROMPT)["input_ids"])
    assert desk.engine.base.tokenizer.convert_tokens_to_ids("<q>") != desk.engine.runner.vocabulary


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "drawn"])
def test_mixed_with_all_others_everybody_has_the_same_tokens(
    temperature: float, desk: Desk, added: Added, tiny_adapters: dict[str, Path]
) -> None:
    names = [None, *tiny_adapters, "added"]
    params = {"max_new_tokens": 10, "temperature": temperature, "top_p": 0.95, "top_k": 300}

    def made(prefix: str) -> list[Job]:
        return [job(f"{prefix}{t}-{n}", PROMPT, n, seed=5, **params) for n in names for t in (0, 1)]

    before = desk.engine.load["mixed_steps"]
    mixed = desk.run(*made(f"mixed{temperature}"))
    assert desk.engine.load["mixed_steps"] > before
    for one in made(f"alone{temperature}"):
        (alone,) = desk.run(one).values()
        twin = mixed[one.job_id.replace("alone", "mixed")]
        assert (alone.error, twin.error) == (None, None)
        assert alone.token_ids == twin.token_ids
        if one.adapter_id == "added" and not temperature:
            ids = added.tokenizer(PROMPT)["input_ids"]
            assert list(alone.token_ids) == greedy(added.peft, ids, 10)
