"""docs/http.md names every route, and every field of a foreign body."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

from lorabatch import Settings
from lorabatch_producer import openai_body, tgi_body
from lorabatch_producer.server import bodies
from lorabatch_producer.server.app import create_app
from tests.models import ROOT

PAGE = re.sub("```.*?```", "", (ROOT / "docs" / "http.md").read_text(), flags=re.DOTALL)
NAMED = re.findall("`([^`]+)`", PAGE)


def test_every_route_is_named(settings: Settings) -> None:
    named = {
        (method, path)
        for text in NAMED
        for *methods, path in [text.split(" ")]
        for method in methods
        if path.startswith("/")
    }
    there = {
        (method.upper(), path)
        for path, methods in create_app(settings).openapi()["paths"].items()
        for method in methods
    }
    assert named == there


@pytest.mark.parametrize(
    "fields",
    [
        bodies.CHAT["properties"],
        bodies.COMPLETION["properties"],
        openai_body.LABELS,
        tgi_body.SAME_NAME,
        tgi_body.FLAGS,
        tgi_body.LORAX,
    ],
)
def test_every_field_is_named(fields: Iterable[str]) -> None:
    assert set(fields) <= set(NAMED)
