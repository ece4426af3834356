"""transformers + PEFT mixed batches (`adapter_names=`) as a peer, in this process.

Prompts are left-padded and run `batch` at a time. Needs peft.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from bench.workload import Request


class PeftPeer:
    """One loaded model with its adapters; `run` makes it run all requests."""

    def __init__(
        self,
        folder: Path,
        adapters: list[Path],
        requests: list[Request],
        *,
        dtype: torch.dtype,
        batch: int,
        new: int,
    ) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self.requests, self.batch, self.new = requests, batch, new
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        for i, path in enumerate(adapters):
            if i == 0:
                model = PeftModel.from_pretrained(model, path, adapter_name=path.name)
            else:
                model.load_adapter(path, adapter_name=path.name)
        self.model = model.to(dtype).eval()
        self.model.generation_config.eos_token_id = None
        self._generate(requests[:batch], 2)

    def run(self) -> float:
        """Seconds for all requests."""
        started = time.perf_counter()
        for first in range(0, len(self.requests), self.batch):
            self._generate(self.requests[first : first + self.batch], self.new)
        return time.perf_counter() - started

    def close(self) -> None:
        del self.model

    @torch.no_grad()
    def _generate(self, some: list[Request], new: int) -> None:
        width = max(len(r.ids) for r in some)
        pads = [width - len(r.ids) for r in some]
        rows = [[0] * p + list(r.ids) for p, r in zip(pads, some, strict=True)]
        mask = [[0] * p + [1] * (width - p) for p in pads]
        self.model.generate(
            input_ids=torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **({"adapter_names": [r.adapter for r in some]} if some[0].adapter else {}),
        )
