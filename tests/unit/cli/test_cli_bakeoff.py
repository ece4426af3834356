"""The same prompts with several adapters: one batch, a page that nothing can break out of, a
table that no spreadsheet runs."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from lorabatch import Ledger, Result
from lorabatch.ledger import Claim
from lorabatch.tables import batches, jobs
from lorabatch_producer import watching
from tests.command_line import Cli
from tests.played_worker import by_adapter, fails, run_queued, succeeds, working

HOSTILE = "<script>alert(1)</script> \"'&</td></table>"
FORMULA = "=cmd()|'/c calc'!A1"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "PAUSE_S", 0.01)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["q"], [HOSTILE], [FORMULA], ["plain"]])
    return path


def baked(cli: Cli, prompts: Path, *more: object, code: int = 0, names: str = "sql,poem") -> Any:
    page = prompts.with_name("out.html")
    given = (prompts, "--prompt-column", "q", "--adapters", names, "--output", page)
    return cli("bakeoff", *given, *more, code=code)


class Seen(HTMLParser):
    """Elements of a page, and the texts of its cells."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.elements = set[str]()
        self.attributes = set[str]()
        self.cells: list[list[str]] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1][-1:] = [part + data for part in self.cells[-1][-1:]]


def echoes(claim: Claim) -> Result:
    """What was asked, as it was."""
    return succeeds(claim, text=claim.job.prompt)


def test_hostile_texts_stay_texts(cli: Cli, ledger: Ledger, prompts: Path) -> None:
    table = prompts.with_name("out.csv")
    with working(ledger, echoes):
        done = baked(cli, prompts, "--base", "--csv", table)
    assert f"3 prompts with 3 adapters in {prompts.with_name('out.html')}" in done.stdout
    page = Seen(prompts.with_name("out.html"))
    assert [cell.strip() for cell in page.cells[0]] == ["prompt", "(base model)", "sql", "poem"]
    assert [len(row) for row in page.cells] == [4, 4, 4, 4]
    for cell in page.cells[1]:
        assert HOSTILE in cell
    assert "5 tokens read, 3 generated, eos_token" in page.cells[1][1]
    assert not page.elements & {"script", "img", "link", "iframe", "object", "a"}
    assert not {name for name in page.attributes if name.startswith("on")} | (
        page.attributes & {"href", "src"}
    )
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == [HOSTILE, f"'{FORMULA}", "plain"]
    assert rows[1]["poem text"] == f"'{FORMULA}"
    assert (rows[2]["sql prompt_tokens"], rows[2]["(base model) output_tokens"]) == ("5", "3")
    assert rows[2]["sql finish_reason"] == "eos_token"


def test_names_of_files_and_tenants_stay_texts(cli: Cli, ledger: Ledger, prompts: Path) -> None:
    named = prompts.rename(prompts.with_name("<b>&.csv"))
    with working(ledger):
        baked(cli, named)
    text = named.with_name("out.html").read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;.csv" in text


def test_failed_jobs_are_shown(cli: Cli, ledger: Ledger, prompts: Path) -> None:
    table = prompts.with_name("out.csv")
    with working(ledger, by_adapter):
        done = baked(cli, prompts, "--csv", table, names="sql,broken", code=1)
    assert "failed jobs: 3" in done.stderr
    page = Seen(prompts.with_name("out.html"))
    assert "sql: plain" in page.cells[3][1]
    assert "unknown_adapter: no adapter of that id" in page.cells[3][2]
    assert "3 of 6 jobs succeeded, 3 failed" in prompts.with_name("out.html").read_text()
    with table.open(newline="") as file:
        row = list(csv.DictReader(file))[2]
    assert (row["sql error"], row["broken text"]) == ("", "")
    assert row["broken error"] == "unknown_adapter: no adapter of that id"


def test_the_same_command_goes_on(cli: Cli, ledger: Ledger, prompts: Path) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lorabatch_producer.commands.bakeoff.watch", stopped)
        assert "the same command again" in baked(cli, prompts, code=130).stderr
    assert not prompts.with_name("out.html").exists()
    run_queued(ledger, fails_with("poem"))
    with working(ledger):
        again = baked(cli, prompts, names=" poem, sql")
    rows = _rows(ledger)
    assert len({row.batch_id for row in rows}) == 1
    assert len([row for row in rows if not row.superseded]) == 6
    assert len(rows) == 9  # those of one adapter ran again
    assert "6/6 done, 0 failed" in again.stdout


def fails_with(adapter: str) -> Callable[[Claim], Result]:
    return lambda claim: fails(claim) if claim.job.adapter_id == adapter else succeeds(claim)


def _rows(ledger: Ledger) -> list[Any]:
    with ledger.engine.begin() as connection:
        return list(connection.execute(sa.select(jobs)))


def test_seeds_are_those_of_the_row(cli: Cli, ledger: Ledger, prompts: Path) -> None:
    seen: list[tuple[str | None, int]] = []
    noted = threading.Lock()

    def notes(claim: Claim) -> Result:
        with noted:
            seen.append((claim.job.prompt, claim.job.seed))
        return succeeds(claim)

    with working(ledger, notes):
        baked(cli, prompts, "--base", "--temperature", 1.0)
    assert len(seen) == 9
    assert len(set(seen)) == 3
    assert len({seed for _, seed in seen}) == 3


def test_rows_that_name_an_adapter_have_all(cli: Cli, ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"adapter_id": "html", "messages": [{"role": "user", "content": "hi"}]}\n'
        '{"prompt": "two", "n": 2, "temperature": 1}\n'
    )
    with working(ledger):
        done = cli("bakeoff", path, "--adapters", "sql", "--output", tmp_path / "out.html", code=1)
    assert "line 2: invalid_job: n, best_of: wanted one text of each adapter (got 2)" in done.stderr
    page = Seen(tmp_path / "out.html")
    assert [row[0].split("in.jsonl")[0] for row in page.cells[1:]] == ["user: hi"]
    assert "sql: hi" in page.cells[1][1]


CALLS = {
    "messages": [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "noon"},
    ],
    "tools": [{"type": "function", "function": {"name": "now"}}],
}


def test_openai_lines_and_tools_within_a_budget(cli: Cli, ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    body = {"model": "other", "max_tokens": 5, **CALLS}
    whole = {"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": body}
    path.write_text(f"{json.dumps(whole)}\n{json.dumps(CALLS)}\n")
    seen: list[tuple[Any, ...]] = []

    def notes(claim: Claim) -> Result:
        job = claim.job
        seen.append((job.adapter_id, job.sampling_params.max_new_tokens, len(job.tools or ())))
        return succeeds(claim)

    given = ("bakeoff", path, "--adapters", "sql", "--output", tmp_path / "out.html")
    with working(ledger, notes):
        cli(*given, "--max-tokens-total", 1000)
    assert sorted(seen) == [("sql", 5, 1), ("sql", 256, 1)]
    asked = Seen(tmp_path / "out.html").cells[1][0]
    assert 'assistant: {"id":"c"' in asked
    assert "None" not in asked
    with ledger.engine.connect() as connection:
        assert connection.scalar(sa.select(batches.c.max_tokens)) == 1000
    with working(ledger):
        refused = cli(*given, "--system", "be short", code=1)
    assert "line 1: invalid_job: system: a line in OpenAI's form says all" in refused.stderr


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ("sql,sql", "'sql' is given twice"),
        ("sql,", "wanted names of adapters, separated by commas (got '')"),
        ("../x", "wanted names of adapters, separated by commas (got '../x')"),
    ],
)
def test_names_that_cannot_be_compared(
    cli: Cli, ledger: Ledger, prompts: Path, names: str, why: str
) -> None:
    assert why in baked(cli, prompts, names=names, code=2).stderr
    assert _rows(ledger) == []


def test_places_are_looked_at_before_anything_is_accepted(
    cli: Cli, ledger: Ledger, prompts: Path
) -> None:
    assert "is a file of prompts" in baked(cli, prompts, "--csv", prompts, code=2).stderr
    nowhere = prompts.parent / "no" / "out.csv"
    assert "no such folder" in baked(cli, prompts, "--csv", nowhere, code=2).stderr
    assert _rows(ledger) == []
