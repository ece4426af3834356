"""Settings: what is refused and how, where values come from, and their defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabatch import Settings
from lorabatch.errors import SettingsError
from lorabatch.settings import PREFIX

BAD = [
    ("MAX_SEQS", "0", "LORABATCH_MAX_SEQS: Input should be greater than or equal to 1 (got '0')"),
    ("MAX_SEQS", "many", "LORABATCH_MAX_SEQS: Input should be a valid integer"),
    ("MAX_SEQS", "1.5", "LORABATCH_MAX_SEQS: "),
    ("THREADS", "-1", "LORABATCH_THREADS: "),
    ("MAX_STEP_TOKENS", "8", "LORABATCH_MAX_STEP_TOKENS: "),
    ("MAX_STEP_TOKENS", "16", "max_step_tokens 16 is below max_seqs 32"),
    ("MAX_CONTEXT_TOKENS", "8", "LORABATCH_MAX_CONTEXT_TOKENS: "),
    ("KV_CACHE_TOKENS", "1024", "kv_cache_tokens 1024 is below max_context_tokens 2048"),
    ("BLOCK_SIZE", "0", "LORABATCH_BLOCK_SIZE: "),
    ("ADAPTER_SLOTS", "-1", "LORABATCH_ADAPTER_SLOTS: "),
    ("MAX_ADAPTER_RANK", "2048", "LORABATCH_MAX_ADAPTER_RANK: "),
    ("ADAPTER_CACHE_BYTES", "5", "LORABATCH_ADAPTER_CACHE_BYTES: "),
    ("LOOKAHEAD", "0", "LORABATCH_LOOKAHEAD: "),
    ("AGE_CAP_S", "0", "LORABATCH_AGE_CAP_S: "),
    ("LEASE_S", "0.5", "LORABATCH_LEASE_S: "),
    ("VISIBILITY_TIMEOUT_S", "0", "LORABATCH_VISIBILITY_TIMEOUT_S: "),
    ("SWEEP_INTERVAL_S", "0", "LORABATCH_SWEEP_INTERVAL_S: "),
    ("RESEND_AFTER_S", "0", "LORABATCH_RESEND_AFTER_S: "),
    ("DRAIN_S", "-1", "LORABATCH_DRAIN_S: "),
    ("MAX_ATTEMPTS", "0", "LORABATCH_MAX_ATTEMPTS: "),
    ("RESULT_EXPIRES_S", "1", "LORABATCH_RESULT_EXPIRES_S: "),
    ("LOG_LEVEL", "loud", "LORABATCH_LOG_LEVEL: "),
    ("LOG_FORMAT", "xml", "LORABATCH_LOG_FORMAT: "),
    ("DTYPE", "int8", "LORABATCH_DTYPE: "),
    ("DEVICE", "gpu", "LORABATCH_DEVICE: allowed: auto, cpu, cuda, cuda:N, cuda:any (got 'gpu')"),
    ("BROKER_URL", "amqp://host", "LORABATCH_BROKER_URL: allowed: a redis://"),
    ("RESULT_BACKEND_URL", "file:///x", "LORABATCH_RESULT_BACKEND_URL: allowed: a redis://"),
    ("RESULT_BACKEND_URL", "lorabatches", "URL, lorabatch, or lorabatch+ before a database URL"),
    ("BROKER_URL", "lorabatch", "allowed: a redis://, rediss:// or redis+socket:// URL (got"),
    ("DATABASE_URL", "mysql://x/y", "LORABATCH_DATABASE_URL: allowed: a sqlite:///FILE or postg"),
    ("QUEUE", "a b", "LORABATCH_QUEUE: queue 'a b': wanted letters"),
    ("QUEUE", "a\n", r"LORABATCH_QUEUE: queue 'a\n': wanted letters"),
    ("CONSUME", ",", "LORABATCH_CONSUME: wanted one queue at least"),
    ("CONSUME", "ok,a b", "LORABATCH_CONSUME: queue 'a b': wanted letters"),
    ("ADAPTERS", "/etc", "LORABATCH_ADAPTERS: '/etc' is a path without a name; write NAME=/etc"),
    ("ADAPTERS", "a=b=c", "LORABATCH_ADAPTERS: "),
    ("ADAPTERS", "../x=/etc", "the name '../x' may hold letters"),
    ("ADAPTERS", "a=/x,a=/y", "the name 'a' is given twice"),
    ("ADAPTERS", "a@..!", "'..!' is not a revision"),
    ("NO_SUCH", "1", "LORABATCH_NO_SUCH: no such setting"),
]


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORABATCH_HOME", str(tmp_path))


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_a_bad_value_is_refused_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_setting_has_a_description_or_says_all_by_its_choices() -> None:
    silent = {n for n, field in Settings.model_fields.items() if not field.description}
    assert silent <= {"log_level", "log_format"}


def test_the_defaults_are_the_embedded_servers(tmp_path: Path) -> None:
    settings = Settings.load()
    assert settings.embedded_broker
    assert settings.embedded_database
    assert settings.resolved_database_url == f"sqlite:///{tmp_path}/lorabatch.db"


def test_keywords_go_before_variables_before_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lorabatch.toml").write_text("max_seqs = 4\nlease_s = 7.0\nadapter_slots = 3\n")
    monkeypatch.setenv("LORABATCH_MAX_SEQS", "5")
    monkeypatch.setenv("LORABATCH_LEASE_S", "8")
    settings = Settings.load(max_seqs=6)
    assert (settings.max_seqs, settings.lease_s, settings.adapter_slots) == (6, 8.0, 3)


def test_the_file_is_checked_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "lorabatch.toml"
    file.write_text("max_seq = 4\n")
    with pytest.raises(SettingsError, match="max_seq: no such field"):
        Settings.load()
    file.write_text("max_seqs = \n")
    with pytest.raises(SettingsError, match="not valid TOML"):
        Settings.load()
    monkeypatch.setenv("LORABATCH_CONFIG", "/no/such/file.toml")
    with pytest.raises(SettingsError, match=r"no file at '/no/such/file\.toml'"):
        Settings.load()


def test_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABATCH_BROKER_URL", "")
    monkeypatch.setenv("LORABATCH_MAX_SEQS", "")
    assert Settings.load().embedded_broker
    assert Settings.load().max_seqs == 32


def test_adapters(tmp_path: Path) -> None:
    text = f"org/a, b={tmp_path}, c=org/c@v1, org/d@main,"
    found = Settings.load(adapters=text).adapters
    assert [(a.name, a.location, a.revision) for a in found] == [
        ("org/a", "org/a", None),
        ("b", str(tmp_path), None),
        ("c", "org/c", "v1"),
        ("org/d", "org/d", "main"),
    ]


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_postgresql_goes_through_psycopg(scheme: str) -> None:
    settings = Settings.load(database_url=f"{scheme}://u:p@h/db")
    assert settings.resolved_database_url == "postgresql+psycopg://u:p@h/db"


@pytest.mark.parametrize("url", ["lorabatch", "lorabatch+sqlite:///x.db", "rediss://u:p@h/1"])
def test_results_may_be_left_in_the_ledger(url: str) -> None:
    assert Settings.load(result_backend_url=url).result_backend_url == url


@pytest.mark.parametrize("name", ["broker_url", "database_url"])
def test_a_password_is_not_repeated_in_the_error(name: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load(**{name: "amqp://user:hunter2@host/x"})
    assert "hunter2" not in str(caught.value)
