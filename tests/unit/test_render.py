"""Adapters' templates in a process of their own: the same text as in-process, and every bound."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorabatch import Job
from lorabatch.errors import EngineFault, InvalidAdapter, InvalidJob, LoraBatchError
from lorabatch_worker.adapters import render as render_module
from lorabatch_worker.adapters.render import CHILD, TemplateRenderer
from lorabatch_worker.adapters.weights import Adapter
from lorabatch_worker.prompt import Preparer
from tests.models import as_base, claim, tiny_config, tiny_model
from tests.templates import CHATML, ENDLESS, GOOD, OVER_MEMORY, OVER_TIME, SPECIAL, TALK


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    """With a short bound; one for all tests, because every one must leave it usable."""
    made = TemplateRenderer(bound_s=1.5, memory_bytes=1 << 28, retry_s=0.0)
    yield made
    made.close()


def render(renderer: TemplateRenderer, template: str) -> str:
    return renderer.render("j", template, TALK, SPECIAL)


def child_of(renderer: TemplateRenderer) -> Any:
    assert renderer._children.child is not None
    return renderer._children.child._process


@pytest.fixture(scope="module")
def sound(renderer: TemplateRenderer) -> str:
    return render(renderer, CHATML)


@pytest.mark.parametrize("template", GOOD.values(), ids=GOOD)
def test_the_text_is_that_of_apply_chat_template(
    renderer: TemplateRenderer, tokenizer: Any, template: str
) -> None:
    wanted = tokenizer.apply_chat_template(
        TALK, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert renderer.render("j", template, TALK, tokenizer.special_tokens_map) == wanted
    assert len(wanted) > 3


@pytest.mark.parametrize("template", OVER_TIME.values(), ids=OVER_TIME)
def test_a_template_that_does_not_end_is_ended(
    renderer: TemplateRenderer, sound: str, template: str
) -> None:
    with pytest.raises(InvalidAdapter, match=r"job 'j': .* was not done after 1\.5 s"):
        render(renderer, template)
    assert render(renderer, CHATML) == sound


@pytest.mark.parametrize("template", OVER_MEMORY.values(), ids=OVER_MEMORY)
def test_a_template_that_fills_the_memory_is_ended(
    renderer: TemplateRenderer, sound: str, template: str
) -> None:
    with pytest.raises(InvalidAdapter, match="job 'j': .* wanted over 256 MiB of memory"):
        render(renderer, template)
    assert render(renderer, CHATML) == sound


@pytest.mark.parametrize(
    ("template", "error", "words"),
    [
        ("{{ 'x' * 4000001 }}", InvalidAdapter, "made 4000001 characters, allowed 4000000"),
        ("{% for %}", InvalidAdapter, "the chat template is broken: "),
        ("{% frob %}", InvalidAdapter, "the chat template is broken: "),
        ("{{ raise_exception('no\nsystem') }}", InvalidJob, "refuses these messages: no system"),
        ("{{ raise_exception('x' * 9999) }}", InvalidJob, r"x{300}\.\.\.$"),
        ("{{ raise_exception(nobody) }}", InvalidJob, "refuses these messages: "),
        ("{{ messages[9].content }}", InvalidJob, "refuses these messages: "),
        ("{%- macro f() %}{{ f() }}{% endmacro %}{{ f() }}", InvalidJob, "recursion"),
        ("{{ ''.__class__.__mro__ }}", InvalidJob, "unsafe"),
        ("{{ messages.append(1) }}", InvalidJob, "unsafe"),
        ("{% include '/etc/hostname' %}", InvalidJob, "refuses these messages"),
        ("{{ '\\ud800' }}", InvalidJob, "surrogates not allowed"),
        ("(" * 3 + "{{ " + "(" * 100_000, (InvalidAdapter, InvalidJob), "job 'j': "),
        ("{{ " + "-" * 100_000 + "1 }}", (InvalidAdapter, InvalidJob), "job 'j': "),
    ],
)
def test_other_bad_templates(
    renderer: TemplateRenderer,
    sound: str,
    template: str,
    error: type[LoraBatchError] | tuple[type[LoraBatchError], ...],
    words: str,
) -> None:
    with pytest.raises(error, match=words) as caught:
        render(renderer, template)
    assert str(caught.value).startswith("job 'j': ")
    assert "\n" not in str(caught.value)
    assert render(renderer, CHATML) == sound


def test_messages_over_the_bound_do_not_reach_the_child() -> None:
    renderer = TemplateRenderer(max_chars=10)
    with pytest.raises(InvalidJob, match="job 'j': its messages have 30 .* allowed 10"):
        render(renderer, "{{ 1 }}")
    assert renderer._children.child is None


def test_a_child_that_died_is_replaced(renderer: TemplateRenderer, sound: str) -> None:
    first = child_of(renderer).pid
    os.kill(first, signal.SIGKILL)
    assert render(renderer, CHATML) == sound
    assert child_of(renderer).pid != first


def test_a_template_that_brings_the_child_down(monkeypatch: Any, tmp_path: Path) -> None:
    dies = tmp_path / "dies.py"
    dies.write_text('import os\nprint("{}", flush=True)\ninput()\nos.abort()\n')
    monkeypatch.setattr(render_module, "CHILD", dies)
    renderer = TemplateRenderer()
    with pytest.raises(InvalidAdapter, match="job 'j': .* brought down the process .* twice"):
        render(renderer, CHATML)
    renderer.close()


def test_a_child_that_does_not_start_is_no_fault_of_the_adapter(
    monkeypatch: Any, tmp_path: Path
) -> None:
    (tmp_path / "ends.py").write_text("")
    monkeypatch.setattr(render_module, "CHILD", tmp_path / "ends.py")
    with pytest.raises(EngineFault, match="job 'j': the process .* did not start"):
        render(TemplateRenderer(), CHATML)


def test_a_template_over_time_twice_is_left_alone_for_a_while(sound: str) -> None:
    renderer = TemplateRenderer(bound_s=0.3, retry_s=3600)
    for _ in range(2):
        with pytest.raises(InvalidAdapter, match="was not done after 0.3 s"):
            render(renderer, ENDLESS)
    assert renderer._children.child is None
    with pytest.raises(InvalidAdapter, match="job 'k': .* 2 times in a row.* another 3600 s"):
        renderer.render("k", ENDLESS, TALK, SPECIAL)
    assert renderer._children.child is None
    renderer.bound_s = 5.0
    assert render(renderer, CHATML) == sound
    renderer.close()


def test_threads_wait_for_each_other(renderer: TemplateRenderer) -> None:
    """Their waiting is not counted: together they take longer than the bound."""
    slow = "{% for a in range(99) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    got: dict[int, str] = {}

    def ask(number: int) -> None:
        got[number] = renderer.render(f"j{number}", f"{slow}{number}", TALK, SPECIAL)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {number: str(number) for number in range(40)}


def test_closing_ends_what_is_being_rendered_and_refuses_the_next() -> None:
    renderer = TemplateRenderer(bound_s=300)
    render(renderer, CHATML)
    process = child_of(renderer)
    errors: list[Exception] = []

    def ask() -> None:
        try:
            render(renderer, ENDLESS)
        except EngineFault as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    renderer.close()
    thread.join()
    assert process.returncode is not None
    assert "is closed" in str(errors[0])
    with pytest.raises(EngineFault, match="is closed"):
        render(renderer, CHATML)


def test_the_child_goes_with_its_renderer() -> None:
    renderer = TemplateRenderer()
    render(renderer, CHATML)
    process = child_of(renderer)
    del renderer
    assert process.wait(60) is not None


@pytest.mark.parametrize("template", [CHATML, ENDLESS], ids=["idle", "busy"])
def test_the_child_outlives_no_worker(template: str) -> None:
    """Idle it sees that its input ends, busy the kernel ends it."""
    child = subprocess.Popen(
        [sys.executable, "-P", str(CHILD), str(1 << 30)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert json.loads(child.stdout.readline())["kind"] == "ready"
    request = {"template": template, "messages": TALK, "special_tokens": SPECIAL}
    line = json.dumps({**request, "max_chars": 1000, "end_s": 1.0}) + "\n"
    child.stdin.write(line.encode())
    child.stdin.close()
    child.stdout.read()
    assert child.wait(60) == (0 if template == CHATML else -signal.SIGALRM)
    child.stdout.close()


def test_the_child_sees_no_secret_and_no_torch(monkeypatch: Any) -> None:
    monkeypatch.setenv("LORABATCH_DATABASE_URL", "postgresql://me:secret@db/x")
    fresh = TemplateRenderer()
    render(fresh, CHATML)
    proc = Path(f"/proc/{child_of(fresh).pid}")
    assert b"secret" not in (proc / "environ").read_bytes()
    assert "torch" not in (proc / "maps").read_text()
    fresh.close()


def test_no_lock_is_held_while_an_adapters_template_renders(tokenizer: Any) -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Slow(TemplateRenderer):
        def render(self, *_: Any) -> str:
            entered.set()
            assert go_on.wait(60)
            return "slow"

    preparer = Preparer(as_base(tiny_model(tiny_config("llama")), tokenizer), Slow())
    params = {"max_new_tokens": 1}
    talk = Job(messages=TALK, sampling_params=params)  # type: ignore[arg-type]
    plain = Job(prompt="x", sampling_params=params)  # type: ignore[arg-type]
    adapter, made = Adapter("a", "v", {}, CHATML), []
    thread = threading.Thread(target=lambda: made.append(preparer.prepare(claim(talk), adapter)))
    thread.start()
    assert entered.wait(60)
    assert preparer.prepare(claim(plain), None).prompt == tokenizer("x")["input_ids"]
    go_on.set()
    thread.join()
    assert made[0].prompt == tokenizer("slow")["input_ids"]
