"""The picture of `bench.many`: throughput by adapters in use, with the number of slots marked."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from bench.pictures import BLUE, GREY, RED, SHORT
from bench.rows import Row

LAWS = {"zipf": ("drawn by a Zipf law", BLUE, "o"), "even": ("drawn evenly", RED, "s")}


def many(rows: Sequence[Row]) -> Figure:
    """Of 8 adapters that all fit, by how many there are to draw from; a panel a row."""
    figure, axes = plt.subplots(
        1, len(rows), figsize=(max(6.0 * len(rows), 7.5), 4.2), squeeze=False, layout="constrained"
    )
    for axis, row in zip(axes[0], rows, strict=True):
        found = row.figures("of_few")
        for law, (label, colour, mark) in LAWS.items():
            points = sorted(
                (int(name.partition(" ")[0]), share)
                for name, share in found.items()
                if name.endswith(law)
            )
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, marker=mark, label=label)
        axis.axvline(row.number("slots"), color=GREY, linestyle=":", label="slots")
        axis.axhline(1.0, color=GREY, linewidth=0.8)
        counts = sorted({int(name.partition(" ")[0]) for name in found})
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set_ylim(0, 1.25)
        axis.set_xlabel("adapters to draw from")
        axis.set_ylabel("throughput, 8 adapters that fit = 1")
        room = f"{row.number('host_bytes') / 2**30:.0f} GiB for adapters in memory"
        axis.set_title(f"{SHORT.get(str(row['dtype']), row['dtype'])}, {room}")
        axis.legend(loc="lower left")
    return figure
