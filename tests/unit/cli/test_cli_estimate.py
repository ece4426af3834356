"""What files would take, said before anything of them is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from lorabatch import Ledger, Settings
from lorabatch.tables import metadata, usage_events
from lorabatch_producer.estimating import GPU_SLOTS, slots_of
from lorabatch_worker import build
from tests.command_line import Cli
from tests.played_worker import run_queued

SECOND_US = 1_000_000


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "in.csv"
    rows = ["prompt,model,n,temperature", "12345678,sql,,", "1234,sql,2,1", "12345,,,", ",sql,,"]
    path.write_text("\n".join(rows) + "\n")
    return path


def estimated(cli: Cli, *arguments: object, code: int = 1) -> Any:
    return json.loads(cli("batch", "estimate", *arguments, "--json", code=code).stdout)


def options(tokens: int) -> tuple[object, ...]:
    return ("--adapter-column", "model", "--base", "--max-new-tokens", tokens)


def everything(ledger: Ledger) -> dict[str, list[Any]]:
    with ledger.engine.begin() as connection:
        return {
            one.name: sorted(map(repr, connection.execute(sa.select(one))))
            for one in metadata.sorted_tables
        }


def test_without_a_past_the_rules_are_named(cli: Cli, table: Path) -> None:
    found = estimated(cli, table, *options(10))
    assert (found["rows"], found["bad_rows"]) == (3, 1)
    assert found["bad_lines"][0]["line"] == 5
    assert (found["chars_per_token"], found["chars_per_token_from"]) == (4.0, "rule of thumb")
    shown = [tuple(one.values()) for one in found["adapters"]]
    assert shown == [
        (None, 1, 2, 10, 10, "max_new_tokens"),
        ("sql", 2, 3, 30, 30, "max_new_tokens"),
    ]
    assert (found["seconds"], found["seconds_max"], found["tokens_per_s"]) == (None, None, None)


def test_a_past_is_measured(
    cli: Cli, ledger: Ledger, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORABATCH_BASE_MODEL", "tiny")
    past = table.with_name("past.jsonl")
    past.write_text('{"adapter_id": "sql", "prompt": "1234567890"}\n')
    cli("batch", "submit", past)
    run_queued(ledger)  # 5 tokens read, 3 generated
    with ledger.engine.begin() as connection:
        connection.execute(sa.update(usage_events).values(run_us=2 * SECOND_US))
    found = estimated(cli, table, *options(10))
    assert (found["chars_per_token"], found["chars_per_token_from"]) == (2.0, "past jobs")
    shown = [tuple(one.values()) for one in found["adapters"]]
    assert shown == [(None, 1, 3, 10, 10, "max_new_tokens"), ("sql", 2, 6, 30, 6, "past jobs")]
    assert found["tokens_per_s"] == 4.0
    assert found["seconds"] == (9 + 16) / 4.0
    assert found["seconds_max"] == (9 + 40) / 4.0
    text = cli("batch", "estimate", table, *options(10), code=1).stdout
    assert "2.00 characters a token, as past jobs of tiny had" in text
    assert "the most that is asked for, of (base model)" in text
    assert "time: 6 s, at most 12 s, at 4.0 tokens/s" in text
    assert (
        estimated(cli, table, *options(2))["adapters"][1]["output_tokens"] == 5
    )  # 2 at most, and 3


def test_nothing_is_accepted(cli: Cli, ledger: Ledger, table: Path) -> None:
    before = everything(ledger)
    cli("batch", "estimate", table, *options(10), code=1)
    assert everything(ledger) == before
    assert before["jobs"] == before["batches"] == []


def test_what_was_submitted_before_is_said(cli: Cli, table: Path) -> None:
    assert not estimated(cli, table, *options(10))["submitted_before"]
    batch_id = cli("batch", "submit", table, *options(10), code=1).stdout.split()[1]
    text = cli("batch", "estimate", table, *options(10), code=1).stdout
    assert f"submitted before as batch {batch_id}" in text


def test_adapters_that_do_not_fit_are_swapped(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORABATCH_MAX_SEQS", "9")
    path = tmp_path / "many.jsonl"
    lines = [json.dumps({"adapter_id": f"a{n}", "prompt": "p"}) for n in range(10)]
    path.write_text("\n".join([*lines, '{"adapter_id": null, "prompt": "p"}']) + "\n")
    assert estimated(cli, path, code=0)["swaps_at_least"] == {"cpu": 1, "gpu": 2}
    text = cli("batch", "estimate", path).stdout
    assert (
        "adapters: 10; 9 slots on a CPU: at least 1 swaps, 8 slots on a GPU: at least 2 swaps"
        in text
    )
    assert "11 rows are jobs, 0 are bad" in text
    assert "time: unknown, the ledger has no past jobs of" in text
    assert "rule of thumb" in text


@pytest.mark.parametrize(
    ("given", "slots"),
    [
        ({"device": "cuda:1"}, {"gpu": 8}),
        ({"device": "cpu", "max_seqs": 5}, {"cpu": 5}),
        ({"adapter_slots": 3}, {"cpu": 3, "gpu": 3}),
    ],
)
def test_slots_are_those_of_the_settings(
    home: Path, given: dict[str, Any], slots: dict[str, int]
) -> None:
    assert slots_of(Settings.load(home=home, **given)) == slots


def test_a_gpu_has_as_many_slots_as_workers_give_it() -> None:
    assert GPU_SLOTS == build.GPU_SLOTS
