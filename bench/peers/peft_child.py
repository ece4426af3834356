"""transformers + PEFT mixed batches behind two pipes, in a process of their own.

    PYTHON peft_child.py SPEC.json

SPEC: model (folder), dtype, requests [[ids, adapter name or null], ...], adapters {name: folder},
batch, threads, new. Prompts are left-padded and run `batch` at a time with `adapter_names=`.
Prints one JSON line when it is ready, then reads lines: for each, runs all requests and prints
{"seconds": ...}. Needs peft; imports nothing of ours.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch


@torch.no_grad()
def generate(model: Any, some: list[Any], new: int) -> None:
    width = max(len(ids) for ids, _ in some)
    pads = [width - len(ids) for ids, _ in some]
    model.generate(
        input_ids=torch.tensor([[0] * p + ids for p, (ids, _) in zip(pads, some, strict=True)]),
        attention_mask=torch.tensor([[0] * p + [1] * (width - p) for p in pads]),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        **({"adapter_names": [name for _, name in some]} if some[0][1] else {}),
    )


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    import peft
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(spec["threads"])
    dtype = getattr(torch, spec["dtype"])
    model: Any = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype)
    for i, (name, path) in enumerate(spec["adapters"].items()):
        if i == 0:
            model = peft.PeftModel.from_pretrained(model, path, adapter_name=name)
        else:
            model.load_adapter(path, adapter_name=name)
    model = model.to(dtype).eval()
    model.generation_config.eos_token_id = None
    requests, batch, new = spec["requests"], spec["batch"], spec["new"]
    generate(model, requests[:batch], 2)
    print(json.dumps({"version": peft.__version__}), file=replies, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        for first in range(0, len(requests), batch):
            generate(model, requests[first : first + batch], new)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds}), file=replies, flush=True)


if __name__ == "__main__":
    main()
