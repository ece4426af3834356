"""One service for all clients' tests of a process; it outlives them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.service import Service, running_service


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LORABATCH_HOME", raising=False)
        with running_service(tmp_path_factory.mktemp("service")) as service:
            yield service
