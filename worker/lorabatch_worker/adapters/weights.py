"""An adapter's files, read and checked on the host before anything reaches the device.

Raises InvalidAdapter, UnsupportedAdapter; both leave nothing behind.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabatch.errors import InvalidAdapter
from lorabatch.location import public_name
from lorabatch_kernels import LoraWeights
from lorabatch_worker.adapters.base_tokenizer import tokenizer_bytes
from lorabatch_worker.adapters.config import AdapterConfig, read_config
from lorabatch_worker.adapters.defaults import GENERATION, GenerationDefaults, read_defaults
from lorabatch_worker.adapters.template import TEMPLATE, TOKENIZER, read_length, read_template
from lorabatch_worker.adapters.tensors import AdapterTarget, read_tensors
from lorabatch_worker.adapters.tokenizer import TOKENS, read_tokenizer
from lorabatch_worker.adapters.vocabulary import VocabularyChange

__all__ = ["FILES", "Adapter", "AdapterTarget", "read_adapter", "version_of"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS, TEMPLATE, TOKENIZER, GENERATION, TOKENS)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A checked adapter in host memory. `version` is the sha256 of its files; `tokenizer` is the
    base model's with the tokens that this adapter adds, None if it adds none. `max_length`: tokens
    of the longest text that it says it is meant for."""

    adapter_id: str
    version: str
    sites: Mapping[str, LoraWeights]
    chat_template: str | None
    vocabulary: VocabularyChange | None = None
    defaults: GenerationDefaults | None = None
    tokenizer: Any | None = None
    max_length: int | None = None

    @property
    def nbytes(self) -> int:
        ends = self.vocabulary.tensors if self.vocabulary else []
        tensors = sum(t.nbytes for t in ends) + sum(w.nbytes for w in self.sites.values())
        return tensors + tokenizer_bytes(self.tokenizer)

    @property
    def rank_rows(self) -> int:
        """That it takes on a GPU, the same in every layer."""
        return max((site.rows for site in self.sites.values()), default=0)

    @property
    def vocabulary_size(self) -> int | None:
        """Token ids that it has, where they are not as many as the base's."""
        return self.vocabulary.size if self.vocabulary else None


def read_adapter(
    adapter_id: str, folder: Path, target: AdapterTarget, version: str | None = None
) -> Adapter:
    """Read and check the adapter in `folder`; `version`: where it is known already."""
    try:
        config = read_config(folder / CONFIG)
        _check_base(config, target)
        path = folder / WEIGHTS
        if not path.is_file():
            pickles = [f.name for f in folder.glob("adapter_model.*")]
            found = f"; {pickles[0]} is not read, convert it to safetensors" if pickles else ""
            raise InvalidAdapter(f"{WEIGHTS} is missing{found}")
        version = version or version_of(folder)
        sites, vocabulary = read_tensors(path, config, target)
        template = read_template(folder)
        base_size = target.ends.vocabulary if target.ends else None
        size = vocabulary.size if vocabulary and vocabulary.size else base_size
        tokenizer = read_tokenizer(folder, target.tokenizer, size, base_size)
        defaults = read_defaults(folder, size)
        length = read_length(folder)
    except InvalidAdapter as error:
        raise type(error)(f"adapter {adapter_id!r}: {error}") from None
    return Adapter(adapter_id, version, sites, template, vocabulary, defaults, tokenizer, length)


def _check_base(config: AdapterConfig, target: AdapterTarget) -> None:
    if config.base_model is None:
        return
    name = last_part(config.base_model)
    if name not in {last_part(known) for known in target.base_names}:
        raise InvalidAdapter(
            f"trained on {public_name(config.base_model)!r}, but the base model here is "
            f"{min(map(public_name, target.base_names))!r}; if they are the same model, add the "
            "name to LORABATCH_BASE_MODEL_ALIASES"
        )


def last_part(name: str) -> str:
    """A model's name without owner, folders and case."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].casefold()


def version_of(folder: Path) -> str:
    """The sha256 of an adapter's files, by their names."""
    digest = hashlib.sha256()
    for name in FILES:
        path = folder / name
        if path.is_file():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256")
            digest.update(f"{name}\0{content.hexdigest()}\0".encode())
    return digest.hexdigest()
