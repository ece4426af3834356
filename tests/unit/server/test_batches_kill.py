"""Servers that die or stop in the middle of a batch: whoever comes next goes on, and each line is
one job and one line of one output."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import openai
import pytest

from lorabatch import Job, Ledger, Settings
from lorabatch.files import Files
from lorabatch.openai_batches import OpenAIBatches
from lorabatch_producer import Producer
from lorabatch_producer.batch import Lines
from lorabatch_producer.server import batch_steps
from lorabatch_producer.server.batch_steps import Gone, Held, Steps
from tests.http_server import served
from tests.openai_client import CHAT_URL, batch_of, client_of, ended, line, lines_in
from tests.played_worker import fails, run_queued, working

LINES = 2500
START_S = 60.0


def serving(settings: Settings, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """`lorabatch serve` as a process of its own, and its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = ("home", "database_url", "broker_url", "lease_s")
    env = {f"LORABATCH_{name.upper()}": str(getattr(settings, name)) for name in names}
    command = [sys.executable, "-m", "lorabatch_producer.cli", "serve", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, **env}, stdout=output, stderr=output)
    url, end_s = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    while True:
        try:
            httpx.get(f"{url}/healthz")
            return process, url
        except httpx.TransportError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end_s, "the server did not start in time"
            time.sleep(0.05)


def goes_on(client: openai.OpenAI, batch: openai.types.Batch, ledger: Ledger, lines: int) -> None:
    """To its end, with one job and one line of output for each line."""
    with working(ledger):
        done = ended(client, batch)
    assert done.status == "completed"
    ids = [one["custom_id"] for one in lines_in(client, done.output_file_id)]
    assert ids == [str(n) for n in range(lines)]
    assert ledger.counts() == {"succeeded": lines}
    assert [f.id for f in client.files.list(purpose="batch_output")] == [done.output_file_id]


def test_a_server_that_is_killed_is_followed_by_another(
    http_settings: Settings, ledger: Ledger, tmp_path: Path
) -> None:
    settings = http_settings.model_copy(update={"lease_s": 1.0})
    process, url = serving(settings, tmp_path / "log")
    try:
        with client_of(url) as client:
            batch = batch_of(client, [line(n) for n in range(LINES)])
        while not ledger.counts():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert ledger.counts()["queued"] < LINES
    with served(settings) as url, client_of(url) as client:
        goes_on(client, batch, ledger, LINES)


def test_a_server_that_is_stopped_gives_its_batch_back(
    http_settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its lease of an hour runs out, and in the middle of the file."""
    settings = http_settings.model_copy(update={"lease_s": 3600.0})
    begun = threading.Event()
    accept, keep = Lines.accept, Held.keep

    def accepts(lines: Lines, some: Sequence[Job]) -> None:
        accept(lines, some)
        begun.set()

    def waits_to_be_stopped(held: Held) -> None:
        if begun.is_set():
            while not held._stopping():
                time.sleep(0.01)
            held._kept_s = 0.0  # as if it was long ago
        keep(held)

    with monkeypatch.context() as patched:
        patched.setattr(Lines, "accept", accepts)
        patched.setattr(Held, "keep", waits_to_be_stopped)
        with served(settings) as url, client_of(url) as client:
            batch = batch_of(client, [line(n) for n in range(1200)])
            assert begun.wait(60.0)
    assert ledger.counts() == {"queued": 1000}
    run_queued(ledger, fails)
    with served(settings) as url, client_of(url) as client, working(ledger):
        done = ended(client, batch)
        assert len(lines_in(client, done.output_file_id)) == 200
        assert len(lines_in(client, done.error_file_id)) == 1000
    assert ledger.counts() == {"failed": 1000, "succeeded": 200}, "what failed ran again"


def test_what_was_accepted_too_late_does_not_run(
    http_settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that was silent for long commits lines when others have ended the batch."""
    files, batches = Files(ledger.engine), OpenAIBatches(ledger.engine)
    http_settings.files_folder.mkdir()
    (http_settings.files_folder / "file-1").write_bytes(line("a"))
    files.add("file-1", "acme", "batch", "in.jsonl", 1)
    fields = {"endpoint": CHAT_URL, "completion_window": "24h"}
    batch = batches.add("acme", "file-1", 3600.0, queue="lorabatch", base_names=["tiny"], **fields)
    accept = Lines.accept

    def held(lease_s: float) -> Held:
        return Held(batches, batches.take(lease_s), lease_s, lambda: False)

    with Producer(http_settings) as producer:

        def accepts_late(lines: Lines, some: Sequence[Job]) -> None:
            batches.cancel(batch.batch_id)
            assert Steps(producer, held(60.0)).run() == 0.0
            assert batches.find(batch.batch_id, "acme").status == "cancelled"
            accept(lines, some)

        monkeypatch.setattr(Lines, "accept", accepts_late)
        with pytest.raises(Gone):
            Steps(producer, held(0.0)).run()
    assert ledger.counts() == {"cancelled": 1}


def test_a_holder_hears_of_what_was_changed_meanwhile(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_steps, "KEEP_EVERY_S", 0.0)
    batches = OpenAIBatches(ledger.engine)
    Files(ledger.engine).add("file-1", "acme", "batch", "in.jsonl", 1)
    fields = {"endpoint": CHAT_URL, "completion_window": "24h"}
    made = batches.add("acme", "file-1", 60.0, queue="lorabatch", base_names=["tiny"], **fields)
    held = Held(batches, batches.take(60.0), 60.0, lambda: False)
    held.keep()
    assert batches.cancel(made.batch_id)
    with pytest.raises(Gone):
        held.keep()
