"""Registered adapters with a real worker: versions, tenants, merges, what is set aside, HTTP."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from huggingface_hub import InferenceClient
from safetensors.torch import load_file, save_file
from shop import RealWorker, Shop, model_settings, wait_until
from transformers import AutoTokenizer

from lorabatch import Job, MergedAdapters, Result
from lorabatch.registry import Registered, Registry
from lorabatch_producer.audit import audit
from tests.http_server import served
from tests.models import quiet_peft
from tests.parity import load_reference, reference_tokens, with_adapters

COMMAND = "from lorabatch_producer.cli import main; main()"


class Registering(Shop):
    """A shop whose worker runs the tiny model, and its command line."""

    def __init__(self, home: Path, model: Path) -> None:
        super().__init__(home)
        self.env |= model_settings(model)
        self.registry = Registry(self.ledger.engine, str(model))

    def adapters(self, *given: object, code: int = 0) -> str:
        """`lorabatch adapters`: what it said."""
        command = [sys.executable, "-c", COMMAND, "adapters", *map(str, given)]
        env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **self.env}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def register(self, name: str, folder: Path, tenant: str = "") -> str:
        """Unchecked: the version."""
        whose = ["--tenant", tenant] if tenant else []
        self.adapters("add", name, folder, "--unchecked", *whose)
        found = self.registry.find(tenant or "default", name)
        assert found is not None
        return found.version

    def enqueue(self, adapter_id: str | None = None, **fields: Any) -> str:
        fields = {"sampling_params": {"max_new_tokens": 4}, "prompt": "Hello there", **fields}
        job = Job(adapter_id=adapter_id, **fields)
        self.ledger.accept([job])
        self.send([job])
        return job.job_id

    def result(self, job_id: str) -> Result:
        found = wait_until(job_id, lambda: self.ledger.results([job_id]), 60.0)
        assert isinstance(found[job_id], Result)
        return found[job_id]


@pytest.fixture(scope="module")
def shop(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registering]:
    """One worker for all tests here."""
    made = Registering(tmp_path_factory.mktemp("registering"), tiny_folder)
    worker = RealWorker(made.home / "worker.log", made.env)
    made.workers.append(worker)
    worker.wait_ready()
    yield made
    assert worker.process.poll() is None, worker.text()
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.text()
    made.close()


@pytest.fixture
def mine(tiny_adapters: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_adapters["attention"], tmp_path / "mine"))


def changed(folder: Path, factor: float) -> Path:
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor * factor for name, tensor in load_file(path).items()}, path)
    return folder


def test_what_is_queued_keeps_its_version(shop: Registering, mine: Path) -> None:
    first = shop.register("versioned", mine)
    shop.workers[0].signal(signal.SIGSTOP)
    before = [shop.enqueue("versioned") for _ in range(3)]
    second = shop.register("versioned", changed(mine, 3.0))
    after = [shop.enqueue("versioned") for _ in range(3)]
    shutil.rmtree(mine)
    shop.workers[0].signal(signal.SIGCONT)
    results = [shop.result(job_id) for job_id in before + after]
    assert [r.adapter_version for r in results] == [first] * 3 + [second] * 3
    assert {r.state for r in results} == {"succeeded"}
    assert len({r.token_ids for r in results}) == 2


def test_a_plain_client_s_job_is_bound_too(shop: Registering, mine: Path) -> None:
    version = shop.register("plain", mine)
    asked = shop.generate(
        prompt="Hello", adapter_id="plain", tenant="acme", sampling_params={"max_new_tokens": 2}
    )
    assert asked.get(timeout=60)["adapter_version"] == version


def test_a_tenant_s_adapter_is_nobody_else_s(shop: Registering, mine: Path) -> None:
    version = shop.register("secret", mine, tenant="acme")
    assert shop.result(shop.enqueue("secret", tenant="acme")).adapter_version == version
    other = shop.result(shop.enqueue("secret", tenant="umbrella"))
    assert other.error is not None
    assert other.error.code == "unknown_adapter"
    assert version[:12] not in other.error.message


def test_a_merge_is_an_adapter_of_its_own(
    shop: Registering, tiny_adapters: dict[str, Path]
) -> None:
    for name in ("one", "two"):
        shop.register(name, tiny_adapters["attention" if name == "one" else "all"])
    shutil.copytree(tiny_adapters["attention"], shop.home / "other")
    shop.register("three", changed(shop.home / "other", -2.0))
    merge = {"ids": ["one", "three"], "weights": [1.0, 0.5], "merge_strategy": "ties"}
    merged = shop.result(shop.enqueue(merged_adapters={**merge, "density": 0.5}))
    again = shop.result(shop.enqueue(merged_adapters={**merge, "density": 0.5}))
    single = shop.result(shop.enqueue("one"))
    assert merged.state == "succeeded", merged.error
    assert merged.adapter_id == MergedAdapters(**merge, density=0.5).name
    assert merged.adapter_version == again.adapter_version != single.adapter_version
    assert merged.token_ids == again.token_ids != single.token_ids
    unequal = shop.result(shop.enqueue(merged_adapters={"ids": ["one", "two"]}))
    assert unequal.error is not None
    assert "rank" in unequal.error.message
    unknown = shop.result(shop.enqueue(merged_adapters={"ids": ["one", "nobody"]}))
    assert unknown.error is not None
    assert unknown.error.code == "unknown_adapter"


@pytest.mark.parametrize(("factor", "code"), [(float("nan"), "invalid_adapter"), (1e30, None)])
def test_a_bad_adapter_is_set_aside_and_hurts_nobody(
    shop: Registering, mine: Path, factor: float, code: str | None
) -> None:
    """NaN in its files, or logits that are not finite."""
    name = f"bad-{code}"
    version = shop.register(name, changed(mine, factor))
    base = shop.enqueue()
    first = shop.result(shop.enqueue(name))
    assert first.error is not None
    assert first.error.code == (code or "nonfinite_logits")
    fault = wait_until("set aside", lambda: shop.registry.find("default", name).fault)
    assert fault.failures == 1
    second = shop.result(shop.enqueue(name))
    assert second.error is not None
    assert second.error.code == "adapter_set_aside"
    assert "adapters retry" in second.error.message
    assert shop.result(base).state == "succeeded"
    assert "to be tried again: 1" in shop.adapters("retry", name)
    third = shop.result(shop.enqueue(name))
    assert third.error is not None
    assert third.error.code == first.error.code
    assert third.adapter_version in (version, None)


def test_a_dead_source_delays_only_its_own_jobs(shop: Registering, mine: Path) -> None:
    version = shop.register("alive", mine)
    dead = Registered("", "dead", "d" * 64, "hub:acme/gone", None, 1, 1, created_us=0)
    shop.registry.add(dead)
    waiting = shop.enqueue("dead")
    assert shop.result(shop.enqueue("alive")).adapter_version == version
    gone = shop.result(waiting)
    assert gone.error is not None
    assert gone.error.code == "adapter_unavailable"


def test_workers_load_ahead_when_told_to(shop: Registering, mine: Path) -> None:
    shop.register("early", mine)
    assert shop.adapters("warm", "early").strip().endswith(": loaded")
    assert "not known to this worker" in shop.adapters("warm", "nobody", code=1)


def test_defaults_that_an_adapter_ships_are_used(shop: Registering, mine: Path) -> None:
    (mine / "generation_config.json").write_text('{"max_new_tokens": 3}')
    shop.register("short", mine)
    said = {"ignore_eos": True}
    assert len(shop.result(shop.enqueue("short", sampling_params=said)).token_ids) == 3
    said = {"ignore_eos": True, "max_new_tokens": 5}
    assert len(shop.result(shop.enqueue("short", sampling_params=said)).token_ids) == 5


def test_http_clients_read_the_adapters_text(
    shop: Registering, mine: Path, tiny_folder: Path
) -> None:
    """What transformers and PEFT write, for the base model and for an adapter."""
    shop.register("served", mine)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = tokenizer("Once upon a time").input_ids
    with quiet_peft():
        model = with_adapters(load_reference(tiny_folder), {"served": mine})
    with served(shop.settings) as url:
        hub = InferenceClient(model=url, token="none")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            texts = set()
            for name in (None, "served"):
                text = tokenizer.decode(reference_tokens(model, name, ids, 6)[0])
                asked = hub.text_generation("Once upon a time", adapter_id=name, max_new_tokens=6)
                answer = client.completions.create(
                    model=name or tiny_folder.name,
                    prompt="Once upon a time",
                    max_tokens=6,
                    temperature=0,
                )
                assert asked == answer.choices[0].text == text
                assert answer.usage is not None
                assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 6)
                texts.add(text)
            assert len(texts) == 2
            with pytest.raises(openai.BadRequestError) as error:
                client.completions.create(model="served", prompt="many words " * 3000)
    assert error.value.code == "context_length_exceeded"


def test_http_clients_read_several_texts_and_log_probabilities(
    shop: Registering, mine: Path
) -> None:
    shop.register("several", mine)
    with served(shop.settings) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answer = client.completions.create(
                model="several", prompt="Once", n=3, seed=5, max_tokens=6, logprobs=2
            )
        best = InferenceClient(model=url, token="none").text_generation(
            "Once",
            adapter_id="several",
            details=True,
            best_of=3,
            do_sample=True,
            seed=5,
            max_new_tokens=6,
        )
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(
        len(choice.logprobs.token_logprobs or ()) for choice in answer.choices if choice.logprobs
    )
    assert best.details is not None
    others = best.details.best_of_sequences or []
    assert {best.generated_text, *(other.generated_text for other in others)} == set(texts)
    means = [
        sum(token.logprob or 0 for token in details.tokens) / len(details.tokens)
        for details in (best.details, *others)
    ]
    assert means == sorted(means, reverse=True)
    assert audit(shop.ledger.engine) == []
