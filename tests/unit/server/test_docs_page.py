"""The page for people: all operations, nothing from elsewhere, and examples that are requests."""

from __future__ import annotations

import html
import json
import re

import httpx
import pytest

from lorabatch import Ledger, Settings
from tests.http_server import served
from tests.played_worker import working

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
FORM = re.compile(r"data-path='([^']*)' data-method=(\w+)>(.*?)</form>", re.S)
SOURCE = re.compile(r"(?:src|href)=[\"']?([^\s>\"']+)")


def test_every_operation_is_there_and_nothing_comes_from_elsewhere(http: httpx.Client) -> None:
    page, document = http.get("/docs").text, http.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert f"<code>{method.upper()} {path}</code>" in page
            assert html.escape(operation["summary"]) in page
    assert SOURCE.findall(page) == ["openapi.json"]
    assert "//" not in page.replace("data://", "")


def test_fields_of_bodies_are_told(http: httpx.Client) -> None:
    page = http.get("/docs").text
    chat = page[page.index("POST /v1/chat/completions") :]
    chat = chat[: chat.index("</details>")]
    for row in (
        "<code>model</code><td>string, required<td>",
        "<code>temperature</code><td>number 0 to 10<td>",
        "<code>stop</code><td>string or array<td>",
        "<code>tool_choice</code><td>any<td>",
    ):
        assert row in chat, row
    model = http.get("/v1/models").json()["data"][0]["id"]
    asked = {"model": model, "messages": [{"role": "user", "content": "Go"}]}
    properties = http.get("/openapi.json").json()["paths"]["/v1/chat/completions"]["post"][
        "requestBody"
    ]["content"]["application/json"]["schema"]["properties"]
    names = set(properties) - {*asked, "stream_options"}
    assert len(names) > 20
    for name in names:
        answer = http.post("/v1/chat/completions", json={**asked, name: {"no": "such"}})
        said = answer.json()["error"]["message"]
        assert (answer.status_code, name in said) == (400, True), said
        assert not said.startswith(f"{name}: not supported") or name == "stream", said


def test_its_examples_work_when_they_are_pressed(http_settings: Settings, ledger: Ledger) -> None:
    named = http_settings.model_copy(update={"base_model": "base"})
    with served(named) as url, httpx.Client(base_url=url, timeout=30.0) as http, working(ledger):
        sent = 0
        for path, method, inside in FORM.findall(http.get("/docs").text):
            text = re.search(r"<textarea[^>]*>(.*?)</textarea>", inside, re.S)
            if text is None or "batches" in path:
                continue
            example = html.unescape(text[1])
            assert json.loads(example)
            answer = http.request(
                method, path, content=example, headers={"content-type": "application/json"}
            )
            assert answer.status_code in (200, 202), (path, answer.text)
            sent += 1
    assert sent == 6
