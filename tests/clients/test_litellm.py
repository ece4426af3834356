"""LiteLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.service import Service

CHILD = Path(__file__).with_name("ask_by_litellm.py")


@pytest.fixture(scope="module")
def answers(service: Service) -> Any:
    command = [sys.executable, str(CHILD), service.openai_url, service.key]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_chat(answers: Any) -> None:
    assert "SELECT" in answers["chat"]
    assert 0 < answers["tokens"] <= 24


def test_chat_stream(answers: Any) -> None:
    assert answers["chat_stream"] == answers["chat"]


def test_async_chat(answers: Any) -> None:
    assert answers["async_chat"] == answers["chat"]


def test_unknown_adapter(answers: Any) -> None:
    assert "nobody" in answers["unknown_adapter"]
