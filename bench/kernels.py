"""The CPU's C kernels on their own: LoRA, attention over cache rows, norm, gate, rotary embedding.

    python -m bench.kernels [--quick]

One thread; microseconds, GB/s and GFLOP/s by case, of LoRA also ratios to two rivals. What is
counted is said in `kernels_lora` and `kernels_layer`. Ends with one JSON line.
"""

from __future__ import annotations

import argparse

import torch

from bench import kernels_layer, kernels_lora
from bench.record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cases, two rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    with torch.inference_mode():
        lora = kernels_lora.measure(quick)
        layer = kernels_layer.measure(quick)
    record("kernels", threads=1, quick=quick, cases=lora, **layer)


if __name__ == "__main__":
    main()
