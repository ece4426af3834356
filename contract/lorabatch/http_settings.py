"""The settings of `lorabatch serve`: where it listens, how much it takes, how long it waits.

Part of `Settings`, which reads and checks them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode

from lorabatch.outgoing import Rules

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
    http_read_s: float = Field(
        default=60.0, gt=0, description="longest wait for a request's headers, or its body"
    )
    http_files: Path | None = Field(default=None, description="folder of files; unset: in home")
    http_max_file_bytes: int = Field(default=200 << 20, ge=1024, description="of one uploaded file")
    http_max_batch_lines: int = Field(default=50_000, ge=1, description="of one file of a batch")
    webhook_senders: int = Field(
        default=32, ge=0, le=1000, description="deliveries at a time; 0: this server makes none"
    )
    webhook_per_host: int = Field(default=4, ge=1, description="of them to one host")
    webhook_timeout_s: float = Field(default=15.0, gt=0, le=600, description="of one delivery")
    webhook_retry_s: float = Field(default=5.0, gt=0, description="first pause; each is longer")
    webhook_max_attempts: int = Field(default=24, ge=1, description="then it has failed")
    webhook_max_age_s: float = Field(default=259_200.0, gt=0, description="the same")
    webhook_ports: Annotated[tuple[int, ...], NoDecode] = Field(
        default=(443,), description="comma list: that webhooks may be at; any: every port"
    )
    webhook_private: bool = Field(
        default=False, description="allow private addresses, and http to this machine"
    )
    webhook_ca: Path | None = Field(
        default=None, description="file of certificates to trust besides the system's"
    )

    @field_validator("webhook_ports", mode="before")
    @classmethod
    def _port_list(cls, value: object) -> object:
        if value == "any":
            return ()
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip()) or value
        return value

    @property
    def outgoing_rules(self) -> Rules:
        return Rules(self.webhook_private, self.webhook_ports)
