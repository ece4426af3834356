"""Every linear layer of the model, made ready to carry adapters.

Each `nn.Linear` (and gpt2's Conv1D), the output head included, becomes a `LoraLinear`, which adds
the adapters' share for those tokens that have one. Layers that read the same input (q, k and v;
gate and up) are multiplied as one matrix, and one call adds all their adapters. Module names stay
PEFT's, so that adapter files address the layers by the names they were trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorabatch_kernels import LoraSite, LoraTerms, SiteGroup
from lorabatch_worker.linear import SharedInput
from lorabatch_worker.step import StepContext

__all__ = ["LoraLinear", "attach_sites", "linear_shapes", "own_weights", "weight_of"]

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class LoraGroup:
    """Layers that share their input: one product, and the adapters of all of them at once."""

    def __init__(self, product: SharedInput, sites: SiteGroup, context: StepContext) -> None:
        self.product = product
        self.sites = sites
        self.context = context

    def part(self, x: Tensor, number: int) -> Tensor:
        """x [..., in] -> [..., out of layer `number`]."""
        return self.product.part(x, number, lambda: self._adding(x))

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Of q, k and v: x [1, T, in] -> [1, T, out of all of them], q and k turned by cos and sin
        [T, head width]."""
        terms = self._terms(x)
        y: Tensor = self.product.dense(x)
        terms.rotate(y[0], cos, sin)
        return y

    def gated(self, x: Tensor) -> Tensor:
        """Of gate and up: x [1, T, in] -> silu(gate) * up [1, T, width]."""
        terms = self._terms(x)
        return terms.gate(self.product.dense(x)[0])[None]

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """Of one layer: total [1, T, out] += its output of x [1, T, in]."""
        terms = self._terms(x)
        terms.sum(total[0], self.product.dense(x)[0])

    def _adding(self, x: Tensor) -> Callable[[Tensor], None]:
        terms = self._terms(x)
        return lambda y: terms.add_to(y.view(-1, y.shape[-1]))

    def _terms(self, x: Tensor) -> LoraTerms:
        rows = x.reshape(-1, x.shape[-1])
        return LoraTerms(rows, self.sites, self.context.step.map_of(rows.shape[0]))


class LoraLinear(nn.Module):
    """A linear layer plus, for each token with an adapter, what that adds to its output."""

    def __init__(self, group: LoraGroup, number: int) -> None:
        super().__init__()
        self.group = group
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return self.group.part(x, self.number)

    @property
    def site(self) -> LoraSite:
        return self.group.sites.sites[self.number]

    @property
    def bias(self) -> Tensor | None:
        """[out], the base model's."""
        whole = self.group.product.dense.bias
        return None if whole is None else whole[self._first :][: self.out_features]

    @property
    def out_features(self) -> int:
        return self.group.product.widths[self.number]

    def weight_blocks(self) -> Iterator[Tensor]:
        """The base model's weight [out, in], some rows after the other."""
        return self.group.product.dense.weight_blocks(self._first, self.out_features)

    @property
    def _first(self) -> int:
        return sum(self.group.product.widths[: self.number])

    @property
    def weight(self) -> Tensor:
        """Some models look at a projection's dtype."""
        return self.group.product.dense.weight


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) features of each linear layer that adapters may change, by module name."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.nx, module.nf)
    return shapes


def attach_sites(
    model: nn.Module,
    context: StepContext,
    slots: int,
    max_rank: int,
    pool_rows: int | None = None,
) -> dict[str, LoraLinear]:
    """Replace the layers in place: the new ones by module name."""
    made = {}
    for names in _groups(linear_shapes(model)):
        layers = [model.get_submodule(name) for name in names]
        weights = [weight_of(layer) for layer in layers]
        biases: list[Any] = [layer.bias for layer in layers]
        sites = SiteGroup.allocate(
            slots,
            max_rank,
            weights[0].shape[1],
            [w.shape[0] for w in weights],
            weights[0].dtype,
            weights[0].device,
            pool_rows,
        )
        group = LoraGroup(SharedInput(weights, biases), sites, context)
        for number, name in enumerate(names):
            parent, _, child = name.rpartition(".")
            made[name] = LoraLinear(group, number)
            setattr(model.get_submodule(parent), child, made[name])
    return made


def own_weights(model: nn.Module) -> None:
    """Copy what is left of a checkpoint that is mapped from disk, so that its file can go."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def weight_of(layer: nn.Module) -> Tensor:
    """Of a linear layer that is not replaced, [out, in]."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if isinstance(layer, Conv1D) else weight.detach()


def _groups(shapes: dict[str, tuple[int, int]]) -> Iterator[list[str]]:
    """Names of layers that share an input, in the model's order; most stand alone."""
    taken = set()
    for name, (fan_in, _) in shapes.items():
        if name in taken:
            continue
        parent, _, child = name.rpartition(".")
        together = next((some for some in SHARED_INPUTS if child in some), (child,))
        names = [f"{parent}.{other}" if parent else other for other in together]
        if not all(other in shapes and shapes[other][0] == fan_in for other in names):
            names = [name]
        taken |= set(names)
        yield names
