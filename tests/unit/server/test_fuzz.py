"""A few hundred requests made from the OpenAPI document, right and wrong: none is answered with a
server error, or otherwise than the document says. `python -m tests.fuzz_http` makes more."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.fuzz_http import fuzzed, serving


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "home"
    made.mkdir()
    return made


def test_what_the_document_says_is_so(folder: Path) -> None:
    with serving(folder, keys=True) as (url, key):
        headers = {"Authorization": f"Bearer {key}"}
        document = httpx.get(f"{url}/openapi.json", headers=headers).json()
        found = fuzzed(url, key, 2)
    assert found.status == 0, found.said
    operations = [o for path in document["paths"].values() for o in path.values()]
    assert found.cases > 10 * len(operations), found.said
    for operation in operations:
        assert operation["summary"], operation
        assert operation["description"], operation
        assert len(operation["tags"]) == 1
        assert operation["security"] or operation["operationId"] == "alive_healthz_get"
