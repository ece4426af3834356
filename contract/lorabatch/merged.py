"""Several adapters merged into one, as a job asks for it. Raises pydantic's ValidationError."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from lorabatch.fields import MERGED, AdapterName, Model, Weight

__all__ = ["MergedAdapters"]


class MergedAdapters(Model):
    """Several adapters merged into one, with the fields of LoRAX's.

    `weights`: how much of each, 1.0 if not given; one below 0 is taken away. `merge_strategy`:
    `linear` sums; `dare_linear` first drops values at random and scales up what is left; `ties`
    keeps the largest values, then averages those of the sign that prevails in
    `majority_sign_method`, total or frequency; `dare_ties` drops at random and then does the same.
    `density` is the share of values that is kept. As in LoRAX, a strategy ignores what it has no
    use for; here it is left out, so that the same merge has the same name.
    """

    ids: tuple[AdapterName, ...] = Field(min_length=2, max_length=16)
    weights: tuple[Weight, ...] = Field(default=(), validate_default=True)
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] = "linear"
    density: float | None = Field(default=None, strict=True, ge=0.0, le=1.0, validate_default=True)
    majority_sign_method: Literal["total", "frequency"] | None = Field(
        default=None, validate_default=True
    )

    @field_validator("ids")
    @classmethod
    def _ids_differ(cls, ids: tuple[str, ...]) -> tuple[str, ...]:
        twice = [name for number, name in enumerate(ids) if name in ids[:number]]
        if twice:
            raise ValueError(f"wanted different adapters, {twice[0]!r} is there twice")
        return ids

    @field_validator("weights", mode="before")
    @classmethod
    def _weights_or_ones(cls, weights: object, info: ValidationInfo) -> object:
        return (1.0,) * len(info.data.get("ids", ())) if weights in (None, ()) else weights

    @field_validator("weights")
    @classmethod
    def _a_weight_each(cls, weights: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        ids = info.data.get("ids", weights)
        if len(weights) != len(ids):
            raise ValueError(f"wanted {len(ids)}, one for each of ids")
        return weights

    @field_validator("merge_strategy", mode="before")
    @classmethod
    def _linear_unless_given(cls, strategy: object) -> object:
        return "linear" if strategy is None else strategy

    @field_validator("density")
    @classmethod
    def _density_where_used(cls, density: float | None, info: ValidationInfo) -> float | None:
        strategy = info.data.get("merge_strategy", "linear")
        if strategy == "linear":
            return None
        if not density:
            raise ValueError(f"{strategy} wants the share of values to keep, above 0 and up to 1")
        return density

    @field_validator("majority_sign_method")
    @classmethod
    def _method_where_used(cls, method: str | None, info: ValidationInfo) -> str | None:
        return method or "total" if "ties" in info.data.get("merge_strategy", "") else None

    @property
    def canonical(self) -> str:
        """JSON, the same for the same merge."""
        fields = self.model_dump(mode="json", exclude_none=True)
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @property
    def name(self) -> str:
        """What the merge is called where an adapter has its id. Names may coincide: two merges
        are the same if they are equal."""
        return f"{MERGED}/{hashlib.sha256(self.canonical.encode()).hexdigest()[:12]}"
