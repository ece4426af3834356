"""docker-compose.yml against the compose schema and against the settings it sets."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorabatch import Settings
from lorabatch.keys import keys_wanted
from lorabatch_worker.free_gpu import ANY

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"


def services() -> dict[str, Any]:
    """The services with ${VARIABLE:-default} and ${VARIABLE:?error} filled in."""
    text = re.sub(
        r"\$\{(\w+)(?::([-?])([^}]*))?\}",
        lambda m: m[3] if m[2] == "-" else "secret",
        COMPOSE.read_text(),
    )
    found: dict[str, Any] = yaml.safe_load(text)["services"]
    return found


def test_it_is_valid_by_the_compose_schema() -> None:
    command = ["check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(
        [sys.executable, "-m", *command], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_check_can_fail(tmp_path: Path) -> None:
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(COMPOSE.read_text().replace("services:", "servces:"))
    command = ["check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(broken)]
    done = subprocess.run(
        [sys.executable, "-m", *command], check=False, capture_output=True, text=True
    )
    assert done.returncode != 0


def test_its_services_are_those_that_exist() -> None:
    assert sorted(services()) == ["api", "migrate", "postgres", "redis", "second", "worker"]


@pytest.mark.parametrize("service", ["api", "migrate", "second", "worker"])
def test_the_settings_it_sets_are_settings_and_valid(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = services()[service]["environment"]
    ours = {k: str(v) for k, v in environment.items() if k.startswith("LORABATCH_")}
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    settings = Settings.load()
    assert not settings.embedded_broker
    assert not settings.embedded_database
    assert settings.resolved_database_url == (
        "postgresql+psycopg://lorabatch:secret@postgres:5432/lorabatch"
    )
    assert {"LORABATCH_BROKER_URL", "LORABATCH_DATABASE_URL"} <= set(ours)


def test_redis_keeps_what_it_was_given() -> None:
    command = services()["redis"]["command"]
    assert command[command.index("--appendonly") + 1] == "yes"
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"


@pytest.mark.parametrize("service", ["second", "worker"])
def test_workers_start_after_the_migration_and_take_a_gpu_each(service: str) -> None:
    worker = services()[service]
    assert worker["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert worker["environment"]["LORABATCH_DEVICE"] == ANY


@pytest.mark.parametrize("service", ["second", "worker"])
def test_there_may_be_several_of_a_worker(service: str) -> None:
    worker = services()[service]
    alone = {"container_name", "hostname", "ports", "network_mode", "pid"}
    assert not worker.keys() & alone
    shared = [volume for volume in worker["volumes"] if not volume.endswith(":ro")]
    assert shared == ["data:/data"], "the folder of the locks"


def test_the_api_is_for_this_machine_and_asks_for_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    api = services()["api"]
    for name, value in api["environment"].items():
        monkeypatch.setenv(name, str(value))
    settings = Settings.load()
    assert keys_wanted(settings)
    assert api["ports"] == [f"127.0.0.1:8000:{settings.http_port}"]
    assert f":{settings.http_port}/healthz" in api["healthcheck"]["test"][-1]
    assert "data:/data" in api["volumes"], "uploaded files, the same for every server"
    assert float(api["stop_grace_period"].removesuffix("s")) > settings.drain_s
    assert "server" in (ROOT / "Dockerfile").read_text()


def test_the_second_base_model_has_a_queue_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert services()["second"]["profiles"] == ["second"]
    assert "profiles" not in services()["worker"]
    drained = {}
    for service in ("worker", "second"):
        with monkeypatch.context() as patched:
            for name, value in services()[service]["environment"].items():
                patched.setenv(name, str(value))
            drained[service] = Settings.load().consume
    assert drained == {"worker": ("lorabatch", "celery"), "second": ("second",)}


def test_a_worker_has_time_to_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = services()["worker"]
    assert worker["stop_signal"] == "SIGTERM"
    assert float(worker["stop_grace_period"].removesuffix("s")) > Settings.load().drain_s


def test_the_image_holds_every_folder_that_the_wheel_needs() -> None:
    copied = {
        line.split()[1]
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ")
    }
    assert {"contract", "producer", "worker", "kernels", "migrations"} <= copied
