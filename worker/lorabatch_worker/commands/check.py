"""`lorabatch adapters check`: would a worker take these adapters?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorabatch.errors import InvalidAdapter
from lorabatch.settings import Settings
from lorabatch_worker.commands.registry import one_line

if TYPE_CHECKING:
    from lorabatch_worker.adapters.weights import Adapter, AdapterTarget

__all__ = ["EXIT_REFUSED", "adapter_target", "check", "described"]

EXIT_REFUSED = 1


def check(
    folders: Annotated[list[Path], typer.Argument(help="folders that PEFT wrote")],
    base_model: Annotated[str | None, typer.Option(help="folder, or Hub id[@rev]")] = None,
    max_adapter_rank: Annotated[int | None, typer.Option(help="largest rank allowed")] = None,
) -> None:
    """Read and check adapters as a worker does, against the base model; 1 if one is refused."""
    settings = settings_for(base_model, max_adapter_rank)
    target, refused = adapter_target(settings), 0
    from lorabatch_worker.adapters.weights import read_adapter

    for folder in folders:
        try:
            adapter = read_adapter(folder.resolve().name, folder, target)
        except InvalidAdapter as error:
            typer.echo(one_line(f"refused: {error}"))
            refused += 1
        else:
            typer.echo(f"fits {settings.base_model}: {described(adapter, target)}")
    if refused:
        raise typer.Exit(EXIT_REFUSED)


def settings_for(base_model: str | None, max_adapter_rank: int | None) -> Settings:
    # On a CPU: a worker may need the GPU's memory.
    given = {"base_model": base_model, "max_adapter_rank": max_adapter_rank, "device": "cpu"}
    return Settings.load(**{name: v for name, v in given.items() if v is not None})


def adapter_target(settings: Settings) -> AdapterTarget:
    """What adapters must fit. Loads the base model, without an engine."""
    need_worker()
    from lorabatch_worker.target import load_target

    return load_target(settings)


def need_worker() -> None:
    """Exit where what reads adapters is not installed."""
    if find_spec("torch") is None or find_spec("safetensors") is None:
        typer.secho("lorabatch: adapters are read with pip install 'lorabatch[worker]'", err=True)
        raise typer.Exit(2)


def described(adapter: Adapter, target: AdapterTarget) -> str:
    """One line: what it changes, of what rank, its size and its version, and what to beware of."""
    layers = Counter(name.rpartition(".")[2] for name in adapter.sites)
    ranks = sorted({site.a.shape[0] for site in adapter.sites.values()})
    parts = [f"adapter {adapter.adapter_id!r}"]
    if layers:
        listed = ", ".join(f"{count} {name}" for name, count in sorted(layers.items()))
        parts.append(f"{listed} (ranks {ranks[0]} to {ranks[-1]})")
    if adapter.vocabulary is not None:
        parts.append("embedding or output head")
    if adapter.chat_template is not None:
        parts.append("its own chat template")
    parts.append(f"{adapter.nbytes / 1e6:.1f} MB here")
    parts.append(f"version {adapter.version[:12]}")
    return "; ".join([*parts, *(f"WARNING: {warning}" for warning in _warnings(adapter, target))])


def _warnings(adapter: Adapter, target: AdapterTarget) -> Iterator[str]:
    if not adapter.vocabulary and not any(
        site.affine or bool(site.b.any()) for site in adapter.sites.values()
    ):
        yield "it changes nothing, every lora_B is zero"
    length, positions, longest = adapter.max_length, target.positions, target.max_context_tokens
    if length is None or (target.tokenizer and length == target.tokenizer.max_length):
        return
    if positions and length > positions:
        yield (
            f"it says that it is meant for texts of {length:,} tokens, the base model for "
            f"{positions:,}: one that was trained with longer positions gives other text here"
        )
    elif longest and length < longest:
        yield (
            f"it says that it is meant for texts of {length:,} tokens, and a job here may have "
            f"{longest:,} (LORABATCH_MAX_CONTEXT_TOKENS)"
        )
