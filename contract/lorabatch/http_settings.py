"""The settings of `lorabatch serve`: where it listens, how much it takes, how long it waits.

Part of `Settings`, which reads and checks them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings

__all__ = ["HttpSettings"]


class HttpSettings(BaseSettings):
    """Durations are seconds, sizes bytes, as the names say."""

    http_host: str = Field(default="127.0.0.1", description="address that `lorabatch serve` is at")
    http_port: int = Field(default=8000, ge=0, le=65_535, description="its port; 0: any free one")
    http_keys: Literal["auto", "on", "off"] = Field(
        default="auto", description="auto: wanted once there is one, or others reach http_host"
    )
    http_max_body_bytes: int = Field(
        default=16 << 20, ge=1024, description="a larger request is refused, files aside"
    )
    http_wait_s: float = Field(default=600.0, gt=0, description="longest wait for a job's text")
    http_files: Path | None = Field(default=None, description="folder of files; unset: in home")
    http_max_file_bytes: int = Field(default=200 << 20, ge=1024, description="of one uploaded file")
    http_max_batch_lines: int = Field(default=50_000, ge=1, description="of one file of a batch")
