"""The one Settings: from keywords, LORABATCH_* variables, then `lorabatch.toml`, then defaults.

The file is `$LORABATCH_CONFIG`, else `lorabatch.toml` in the data folder if there is one.
With nothing set, everything started with the same LORABATCH_HOME meets at the same embedded
Valkey and SQLite. Durations are seconds, sizes are tokens or bytes, as the names say.
Raises SettingsError, which names the variable, the value seen and what is allowed.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from lorabatch.errors import SettingsError, explain
from lorabatch.fields import queue_name
from lorabatch.http_settings import HttpSettings
from lorabatch.location import AdapterSource, is_path
from lorabatch.urls import BackendUrl, BrokerUrl, DatabaseUrl

__all__ = ["DEFAULT_BASE_MODEL", "AdapterSource", "Settings", "is_path"]

DEFAULT_BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_QUEUE = "lorabatch"
QUEUES = {DEFAULT_QUEUE: (DEFAULT_QUEUE, "celery")}  # plain Celery clients send to celery
PREFIX = "LORABATCH_"
# Variables of the environment alone: where lorabatch.toml is; 0 turns compiled CPU kernels off.
READ_ELSEWHERE = ("config", "native")


class Settings(HttpSettings):
    """All settings, checked. See each field; `lorabatch doctor` prints what is in force."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, env_ignore_empty=True
    )

    home: Path = Field(
        default=Path("~/.lorabatch"), description="data folder: embedded servers, models, cache"
    )
    base_model: str = Field(default=DEFAULT_BASE_MODEL, description="folder, or Hub id[@rev]")
    base_model_aliases: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="other names of the base model that adapters may carry"
    )
    adapters: Annotated[tuple[AdapterSource, ...], NoDecode] = Field(
        default=(), description="comma list: id, id@rev, name=path, name=id@rev, name=s3://..."
    )
    adapter_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        default=(), description="comma list: the folders that local adapters lie in; empty: any"
    )
    hub_token_folder: Path | None = Field(
        default=None, description="folder of Hub tokens, one file for each tenant, by its name"
    )
    broker_url: BrokerUrl | None = Field(default=None, description="redis:// URL; unset: embedded")
    result_backend_url: BackendUrl | None = Field(
        default=None, description="results for Celery clients; lorabatch: ledger; unset: broker"
    )
    database_url: DatabaseUrl | None = Field(
        default=None, description="SQLAlchemy URL; unset: SQLite"
    )
    queue: str = Field(default=DEFAULT_QUEUE, description="where producers send")
    consume: Annotated[tuple[str, ...], NoDecode] = Field(
        default_factory=lambda given: QUEUES.get(queue := given.get("queue", ""), (queue,)),
        description="comma list: what a worker drains; unset: queue, and celery beside lorabatch",
    )
    transport: Literal["atomic", "stock"] = Field(
        default="atomic", description="how workers fetch messages; stock: as kombu does"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:N; cuda:any: a free one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: bfloat16 on cuda and on CPUs that have it, else float32"
    )
    threads: int = Field(default=0, ge=0, le=1024, description="CPU threads; 0: all cores")
    max_seqs: int = Field(default=32, ge=1, le=4096, description="sequences that run at once")
    max_step_tokens: int = Field(default=512, ge=16, le=1_048_576, description="tokens a step")
    max_context_tokens: int = Field(
        default=2048, ge=16, le=10_485_760, description="prompt + output of one job"
    )
    kv_cache_tokens: int = Field(
        default=32_768, ge=16, description="tokens that the KV cache holds, all sequences together"
    )
    block_size: int = Field(default=16, ge=1, le=256, description="tokens of one KV block")
    prefix_cache: bool = Field(
        default=True, description="compute a beginning that prompts share only once"
    )
    adapter_slots: int = Field(
        default=0, ge=0, le=4096, description="adapters on the device; 0: max_seqs, of a GPU 8"
    )
    max_adapter_rank: int = Field(default=64, ge=1, le=1024, description="largest rank allowed")
    adapter_rank_rows: int = Field(default=0, ge=0, description="of a GPU; 0: largest in each slot")
    adapter_cache_bytes: int = Field(
        default=1 << 30, ge=1 << 20, description="host memory for loaded adapters"
    )
    adapter_store: Path | None = Field(
        default=None,
        description="folder of registered local adapters, the same for all workers; unset: in home",
    )
    adapter_disk_bytes: int = Field(
        default=20 << 30, ge=1 << 20, description="disk cache of fetched adapters"
    )
    adapter_max_bytes: int = Field(default=16 << 30, ge=1, description="larger ones are refused")
    adapter_fetch_timeout_s: float = Field(
        default=300.0, gt=0, description="time for fetching one adapter, all attempts together"
    )
    adapter_fetch_attempts: int = Field(
        default=4, ge=1, le=100, description="attempts at a source that does not answer"
    )
    lookahead: int = Field(
        default=4, ge=1, le=64, description="jobs fetched ahead, as a multiple of max_seqs"
    )
    age_cap_s: float = Field(
        default=5.0, gt=0, description="a waiting job older than this goes before resident ones"
    )
    lease_s: float = Field(default=30.0, ge=1.0, description="a silent worker's jobs move on")
    visibility_timeout_s: float = Field(
        default=60.0, ge=1.0, description="Redis gives an unacknowledged message out again"
    )
    sweep_interval_s: float = Field(
        default=10.0, ge=0.5, description="how often accepted jobs that are nowhere are looked for"
    )
    resend_after_s: float = Field(
        default=60.0, ge=0.5, description="a queued job this old without a message is sent again"
    )
    drain_s: float = Field(default=30.0, ge=0.0, description="SIGTERM: time for running jobs")
    max_attempts: int = Field(default=20, ge=1, description="starts before a job is given up")
    max_crashes: int = Field(default=3, ge=3, description="workers it may stop, the last one alone")
    result_expires_s: int = Field(
        default=86_400, ge=60, description="how long Redis keeps a published result"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Settings from keywords, environment and file. Raises SettingsError."""
        try:
            return cls(**overrides)
        except ValidationError as error:
            raise SettingsError(explain_settings(error)) from None
        except tomllib.TOMLDecodeError as error:
            raise SettingsError(f"{_config_file()}: not valid TOML: {error}") from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = TomlConfigSettingsSource(settings_cls, _config_file())
        return init_settings, env_settings, file

    @model_validator(mode="before")
    @classmethod
    def _known_variables_only(cls, values: dict[str, Any]) -> dict[str, Any]:
        known = {PREFIX + name.upper() for name in (*cls.model_fields, *READ_ELSEWHERE)}
        unknown = sorted(k for k in os.environ if k.startswith(PREFIX) and k not in known)
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no such setting; known: {sorted(known)}")
        return values

    @field_validator("home", "hub_token_folder", "adapter_store", "http_files")
    @classmethod
    def _absolute_if_set(cls, folder: Path | None) -> Path | None:
        return folder and folder.expanduser().resolve()

    @field_validator("adapter_roots")
    @classmethod
    def _absolute_roots(cls, roots: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(root.expanduser().resolve() for root in roots)

    @field_validator("adapters", mode="before")
    @classmethod
    def _adapters(cls, value: object) -> object:
        entries = value.split(",") if isinstance(value, str) else value
        if not isinstance(entries, (list, tuple)):
            raise ValueError("a comma list of id, id@rev, name=path")
        found = [
            AdapterSource.parse(e.strip()) if isinstance(e, str) else e
            for e in entries
            if not isinstance(e, str) or e.strip()
        ]
        names = [a.name for a in found]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"the name {twice[0]!r} is given twice; names must differ")
        return tuple(found)

    @field_validator("base_model_aliases", "consume", "adapter_roots", mode="before")
    @classmethod
    def _comma_list(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("queue", "consume")
    @classmethod
    def _queue_names(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        names = (value,) if isinstance(value, str) else value
        if not names:
            raise ValueError("wanted one queue at least")
        for name in names:
            queue_name(name)
        return value

    @field_validator("device")
    @classmethod
    def _device(cls, device: str) -> str:
        if not re.match(r"^(auto|cpu|cuda(:(\d+|any))?)$", device):
            raise ValueError("allowed: auto, cpu, cuda, cuda:N, cuda:any")
        return device

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.kv_cache_tokens < self.max_context_tokens:
            raise ValueError(
                f"kv_cache_tokens {self.kv_cache_tokens} is below max_context_tokens "
                f"{self.max_context_tokens}: the longest job could never run; raise the first"
            )
        if self.max_step_tokens < self.max_seqs:
            raise ValueError(
                f"max_step_tokens {self.max_step_tokens} is below max_seqs {self.max_seqs}: "
                "a step must hold one token of every sequence; raise the first"
            )
        if 0 < self.adapter_rank_rows < self.max_adapter_rank + 2:  # gain and shift beside
            raise ValueError(
                f"adapter_rank_rows {self.adapter_rank_rows} is below max_adapter_rank "
                f"{self.max_adapter_rank} + 2: the largest would never fit; raise the first"
            )
        return self

    @property
    def in_hand(self) -> int:
        """Jobs that a worker fetches at most before it has ended some."""
        return self.max_seqs * self.lookahead

    @property
    def configured_adapters(self) -> list[str]:
        """Names that need no registry: of `adapters`, and of folders in the data folder's."""
        configs = (self.home / "adapters").glob("*/adapter_config.json")
        return sorted({one.name for one in self.adapters} | {path.parent.name for path in configs})

    @property
    def adapter_store_folder(self) -> Path:
        return self.adapter_store or self.home / "adapter-store"

    @property
    def files_folder(self) -> Path:
        return self.http_files or self.home / "files"

    @property
    def embedded_broker(self) -> bool:
        return self.broker_url is None

    @property
    def embedded_database(self) -> bool:
        return self.database_url is None

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'lorabatch.db'}"


def explain_settings(error: ValidationError) -> str:
    """One line; fields carry the name of their environment variable."""
    text = re.sub(r"(://[^:/@\s]*:)[^@\s]*@", r"\1***@", explain(error))
    for name in sorted(Settings.model_fields, key=len, reverse=True):
        text = re.sub(rf"(^|; ){name}: ", rf"\1{PREFIX}{name.upper()}: ", text)
    return text


def _config_file() -> Path | None:
    given = os.environ.get(PREFIX + "CONFIG")
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise SettingsError(f"LORABATCH_CONFIG: no file at {given!r}; give a TOML file")
        return path
    home = Path(os.environ.get(PREFIX + "HOME") or "~/.lorabatch").expanduser()
    path = home / "lorabatch.toml"
    return path if path.is_file() else None
