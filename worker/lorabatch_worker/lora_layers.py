"""Every linear layer of the decoder, made ready to carry adapters.

Each `nn.Linear` (and gpt2's Conv1D) but the output head is wrapped in a `LoraLinear`, which adds
the adapters' share for those tokens that have one. Module names stay PEFT's, so that adapter
files address the layers by the names they were trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorabatch_kernels import LoraSite, add_lora
from lorabatch_worker.step import StepContext

__all__ = ["LoraLinear", "attach_sites", "linear_shapes"]


class LoraLinear(nn.Module):
    """base(x) plus, for each token with an adapter, scale * (x A^T) B."""

    def __init__(self, base: nn.Module, site: LoraSite, context: StepContext) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        rows = y.view(-1, y.shape[-1])
        add_lora(rows, x.reshape(-1, x.shape[-1]), self.site, self.context.step.step_map)
        return y

    @property
    def weight(self) -> Tensor:
        """Some models look at a projection's dtype."""
        return self.base.weight  # type: ignore[return-value]


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) features of each linear layer that adapters may change, by module name."""
    shapes = {}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.nx, module.nf)
    return shapes


def attach_sites(
    model: nn.Module, context: StepContext, slots: int, max_rank: int
) -> dict[str, LoraSite]:
    """Wrap the layers in place: their sites by module name."""
    sites = {}
    for name, (fan_in, fan_out) in linear_shapes(model).items():
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        base = getattr(parent, child)
        weight: Tensor = base.weight
        sites[name] = LoraSite.allocate(
            slots, max_rank, fan_in, fan_out, weight.dtype, weight.device
        )
        setattr(parent, child, LoraLinear(base, sites[name], context))
    return sites


def pool_bytes(sites: dict[str, LoraSite]) -> int:
    """Memory set aside for adapters on the device."""
    tensors: list[torch.Tensor] = [t for site in sites.values() for t in (site.a, site.b)]
    return sum(t.numel() * t.element_size() for t in tensors)
