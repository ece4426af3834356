"""curl."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from tests.clients.service import Service

CHAT = {
    "model": "sql",
    "messages": [{"role": "user", "content": "How many books are there?"}],
    "max_tokens": 24,
    "temperature": 0,
}
JOB = {"adapter_id": "sql", "messages": CHAT["messages"], "max_new_tokens": 24}


def curl(service: Service, path: str, body: object = None, *more: str, key: str = "") -> str:
    sent = () if body is None else ("-H", "content-type: application/json", "-d", json.dumps(body))
    command = ["curl", "-sS", "-H", f"Authorization: Bearer {key or service.key}", *sent, *more]
    done = subprocess.run(
        [*command, service.url + path], capture_output=True, timeout=120, check=True
    )
    return done.stdout.decode()


def told(service: Service, path: str, body: object = None, *more: str, key: str = "") -> Any:
    return json.loads(curl(service, path, body, *more, key=key))


def events(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]


def test_chat(service: Service) -> None:
    answer = told(service, "/v1/chat/completions", CHAT)
    assert "SELECT" in answer["choices"][0]["message"]["content"]


def test_chat_stream(service: Service) -> None:
    found = events(curl(service, "/v1/chat/completions", {**CHAT, "stream": True}, "-N"))
    assert found[-1] == "[DONE]"
    deltas = [json.loads(one)["choices"][0]["delta"] for one in found[:-1]]
    assert "SELECT" in "".join(delta.get("content") or "" for delta in deltas)


def test_text_generation(service: Service) -> None:
    body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 4}}
    assert told(service, "/generate", body)["generated_text"]


def test_jobs(service: Service) -> None:
    head = curl(service, "/jobs", JOB, "-D", "-", "-o", "/dev/null").lower()
    assert " 202 " in head.splitlines()[0]
    where = next(line.split()[1] for line in head.splitlines() if line.startswith("location:"))
    job = told(service, where + "?wait_s=60")
    assert job["state"] == "succeeded"
    assert "SELECT" in job["result"]["text"]
    assert told(service, where, key=service.other_key)["status"] == 404


def test_jobs_stream(service: Service) -> None:
    job = told(service, "/jobs", {**JOB, "stream": True})
    seen = curl(service, f"/jobs/{job['job_id']}/events", None, "-N")
    assert "SELECT" in "".join(json.loads(one).get("text") or "" for one in events(seen))


def test_jobs_idempotent(service: Service) -> None:
    key = ("-H", "Idempotency-Key: from-curl")
    first, again = told(service, "/jobs", JOB, *key), told(service, "/jobs", JOB, *key)
    assert first["job_id"] == again["job_id"]
    assert told(service, "/jobs", {**JOB, "max_new_tokens": 3}, *key)["status"] == 409


def test_jobs_cancelled(service: Service) -> None:
    long = {"prompt": "Once", "max_new_tokens": 1500, "ignore_eos": True}
    job = told(service, "/jobs", long)
    curl(service, f"/jobs/{job['job_id']}", None, "-X", "DELETE")
    assert told(service, f"/jobs/{job['job_id']}?wait_s=60")["state"] == "cancelled"


def test_models(service: Service) -> None:
    assert "sql" in {one["id"] for one in told(service, "/v1/models")["data"]}


def test_unknown_adapter(service: Service) -> None:
    answer = told(service, "/v1/chat/completions", {**CHAT, "model": "nobody"})
    assert answer["error"]["code"] == "model_not_found"


def test_wrong_key(service: Service) -> None:
    assert " 401 " in curl(service, "/v1/models", None, "-i", key="lb-nobody").splitlines()[0]
