"""Migrations of a release that is still to come: what this version's workers must live with."""

from __future__ import annotations

import os
from pathlib import Path

from alembic.config import Config

from lorabatch.database import alembic_config

__all__ = ["LATEST", "later_config", "newest"]

LATEST = "9002"
VERSIONS = Path(__file__).parents[1] / "migrations" / "versions"
LATER = Path(__file__).parent / "later_migrations"


def newest() -> str:
    """The newest revision of this version."""
    return max(path.name[:4] for path in VERSIONS.glob("[0-9]*.py"))


def later_config(url: str) -> Config:
    """For `migrate`: all revisions, with those of the release to come."""
    config = alembic_config(url)
    config.set_main_option("path_separator", "os")
    config.set_main_option("version_locations", os.pathsep.join(map(str, (VERSIONS, LATER))))
    return config
