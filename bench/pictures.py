"""What each picture of `bench.plots` shows; every function takes rows and gives a figure.

Colours are Okabe and Ito's, which colour-blind people can tell apart. Figures of one panel
were measured under the same conditions; those that differ between panels are its title.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.rows import Row

BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#e69f00", "#009e73", "#cc79a7"
SKY, RED, GREY, YELLOW = "#56b4e9", "#d55e00", "#999999", "#f0e442"
ENGINES = {"lorabatch": BLUE, "vllm": ORANGE, "peft": GREEN, "llamacpp": PURPLE}
SHOWN = {"vllm": "vLLM", "peft": "transformers + PEFT", "llamacpp": "llama.cpp"}
PARTS = {
    "gemm": BLUE,
    "attention": ORANGE,
    "lora": GREEN,
    "sample": PURPLE,
    "schedule": SKY,
    "rest": GREY,
}
PART_NAMES = {
    "gemm": "matrix products",
    "lora": "LoRA",
    "sample": "sampling",
    "schedule": "scheduling",
}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
LINES = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, GREY)
MARKS = "osD^vP*"


def _panels(
    rows: Sequence[Row], names: Sequence[str], height: float = 4.2, width: float = 5.0
) -> tuple[Figure, list[tuple[Axes, str, list[Row]]]]:
    """One panel for each combination of the fields `names`, with its title and rows."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    figure, axes = plt.subplots(
        1,
        len(groups),
        figsize=(max(width * len(groups), 7.5), height),
        squeeze=False,
        layout="constrained",
    )
    ordered = sorted(groups.items(), key=lambda item: tuple(map(str, item[0])), reverse=True)
    return figure, [
        (axis, _title(names, key), group)
        for axis, (key, group) in zip(axes[0], ordered, strict=True)
    ]


def _title(names: Sequence[str], key: Sequence[Any]) -> str:
    words = {"max_seqs": "batch {}", "dtype": "{}"}
    return ", ".join(
        words.get(name, "{} " + name.replace("_", " ")).format(SHORT.get(str(value), value))
        for name, value in zip(names, key, strict=True)
        if value is not None
    )


def _adapters(count: int) -> str:
    return f"{count} adapter{'s' * (count != 1)}" if count else "base only"


def _legend(figure: Figure, axes: Iterable[Axes], columns: int = 6) -> None:
    """One legend for all panels, above them."""
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= {label: found.get(label, h) for h, label in zip(handles, labels, strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside upper left", ncols=columns)


def throughput(rows: Sequence[Row]) -> Figure:
    """Output tokens a second by number of adapters, ours beside the peers."""
    figure, panels = _panels(rows, ("dtype", "max_seqs", "output_tokens"))
    for axis, title, group in panels:
        latest = {
            (row.number("adapters"), engine): (speed, row)
            for row in group
            for engine, speed in row.figures("tokens_per_s").items()
        }
        counts = sorted({count for count, _ in latest})
        engines = sorted({e for _, e in latest}, key=lambda e: [*ENGINES, e].index(e))
        width = min(0.8 / len(engines), 0.26)
        for i, engine in enumerate(engines):
            has = [(j, latest[c, engine][0]) for j, c in enumerate(counts) if (c, engine) in latest]
            bars = axis.bar(
                [j + (i - (len(engines) - 1) / 2) * width for j, _ in has],
                [speed for _, speed in has],
                width * 0.94,
                label=SHOWN.get(engine, engine),
                color=ENGINES.get(engine, GREY),
            )
            axis.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
        when = {c: [row.date for (n, _), (_, row) in latest.items() if n == c] for c in counts}
        axis.set_xticks(
            range(len(counts)),
            [f"{c:.0f}\n{min(when[c]):%d %b %H:%M}" for c in counts],
        )
        axis.set(title=title, xlabel="adapters in the mix, and when measured")
    panels[0][0].set_ylabel("output tokens a second")
    _legend(figure, [axis for axis, _, _ in panels])
    return figure


def adapters(rows: Sequence[Row]) -> Figure:
    """Our speed with n adapters as a share of our own base, by batch; and the speed itself."""
    figure, panels = _panels(rows, ("dtype", "threads", "new_tokens"), height=6.2)
    axes = [axis for axis, _, _ in panels]
    grid = axes[0].get_gridspec()
    for axis in axes:
        axis.remove()
    below = figure.add_gridspec(2, grid.ncols)
    first: Axes | None = None
    drawn = []
    for column, (_, title, group) in enumerate(panels):
        share = figure.add_subplot(below[0, column], sharey=first)
        first = first or share
        speed = figure.add_subplot(below[1, column], sharex=share)
        batches = sorted({row.number("batch") for row in group})
        counts = sorted({int(n) for row in group for n in row.figures("tokens_per_s")})
        for i, count in enumerate(counts):
            style: dict[str, Any] = {
                "color": LINES[i % len(LINES)],
                "marker": MARKS[i % len(MARKS)],
                "label": _adapters(count),
            }
            mine = [row for row in group if str(count) in row["tokens_per_s"]]
            mine.sort(key=lambda row: row.number("batch"))
            places = [batches.index(row.number("batch")) for row in mine]
            speeds = [row.figures("tokens_per_s")[str(count)] for row in mine]
            speed.plot(places, speeds, **style)
            shares = [row.figures("of_base").get(str(count), 1.0) for row in mine]
            share.plot(places, shares, **style)
        share.set(title=title)
        share.tick_params(labelbottom=False)
        speed.set(xlabel="batch: sequences at once", ylim=(0, None))
        speed.set_xticks(range(len(batches)), [f"{batch:.0f}" for batch in batches])
        if column == 0:
            share.set_ylabel("share of the base's speed")
            speed.set_ylabel("output tokens a second")
        drawn += [share, speed]
    _legend(figure, drawn)
    return figure


def breakdown(rows: Sequence[Row]) -> Figure:
    """Where a full decode step's time goes, and where the whole workload's."""
    order = ("max_seqs", "dtype", "adapters")
    rows = sorted(rows, key=lambda row: tuple(str(row[name]).zfill(12) for name in order))
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 1.9 + 0.5 * len(rows)), sharey=True, layout="constrained"
    )
    fields = (
        ("decode_step_ms", "a full decode step, ms (of it, products run alone)", "gemm_to_step"),
        ("seconds", "the whole workload, s (of it, products run alone)", "gemm_to_wall"),
    )
    for axis, (field, title, share) in zip(axes, fields, strict=True):
        ends = []
        for y, row in enumerate(rows):
            figures, left = row.figures(field), 0.0
            for part in [*PARTS, *(p for p in figures if p not in PARTS)]:
                width = figures.get(part, 0.0)
                label = PART_NAMES.get(part, part) if y == 0 else None
                axis.barh(y, width, left=left, height=0.66, color=PARTS.get(part), label=label)
                left += width
            floor = f" ({row.number(share):.0%})" if row.get(share) is not None else ""
            axis.text(left, y, f"  {left:.1f}{floor}", va="center", fontsize=8)
            ends.append(left)
        axis.set(title=title, xlim=(0, 1.2 * max(ends)))
        axis.grid(axis="y", visible=False)
        axis.grid(axis="x", visible=True)
    axes[0].set_yticks(
        range(len(rows)),
        [
            f"{SHORT.get(row['dtype'], row['dtype'])}, batch {row['max_seqs']}, "
            + _adapters(row["adapters"])
            for row in rows
        ],
    )
    axes[0].invert_yaxis()
    _legend(figure, axes)
    return figure


def context(rows: Sequence[Row]) -> Figure:
    """Microseconds a token over the context's length: prefill, and decode in a batch."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    fields = (
        ("prefill_us_a_token", "a prompt token"),
        ("decode_us_a_token", "a generated token, of each sequence in the batch"),
    )
    lengths: set[int] = set()
    for axis, (field, title) in zip(axes, fields, strict=True):
        for i, row in enumerate(rows):
            table = {int(n): Row(cell) for n, cell in row["by_context"].items()}
            for cell in table.values():
                cell.where = row.where
            lengths |= set(table)
            axis.plot(
                list(table),
                [cell.number(field) for cell in table.values()],
                color=LINES[i % len(LINES)],
                marker=MARKS[i % len(MARKS)],
                label=f"{SHORT.get(row['dtype'], row['dtype'])}, batch {row['batch']}, "
                + _adapters(row["adapters"]),
            )
        axis.set(title=title, xlabel="tokens of context", ylim=(0, None), xscale="log")
        axis.set_xticks(sorted(lengths), [f"{n:,}" for n in sorted(lengths)])
        axis.minorticks_off()
    axes[0].set_ylabel("microseconds")
    _legend(figure, axes, 3)
    return figure


def service(rows: Sequence[Row]) -> Figure:
    """What the prefix cache saves, and what queue and ledger cost."""
    kinds = [
        (question, found)
        for question in ("prefix", "end_to_end")
        if (found := [row for row in rows if row["question"] == question])
    ]
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(5.6 * len(kinds), 4.4), squeeze=False, layout="constrained"
    )
    for axis, (question, found) in zip(axes[0], kinds, strict=True):
        (_prefix if question == "prefix" else _end_to_end)(axis, found)
        axis.set_ylabel("jobs a second")
        axis.margins(y=0.18)
        axis.legend(loc="upper left", ncols=2)
    return figure


def _prefix(axis: Axes, rows: Sequence[Row]) -> None:
    names = {"plain": ("without", GREY), "cached": ("with the prefix cache", BLUE)}
    _jobs_a_second(axis, rows, names)
    axis.set_title(f"{rows[-1]['prefix_tokens']} tokens shared by jobs of an adapter")
    axis.set_xticks(
        range(len(rows)),
        [
            f"{SHORT.get(row['dtype'], row['dtype'])}, {row['jobs']} jobs\n"
            f"{row['times_faster']}x, hit rate {row['hit_rate']:.0%}"
            for row in rows
        ],
    )


def _end_to_end(axis: Axes, rows: Sequence[Row]) -> None:
    names = {"engine": ("engine alone", GREY), "service": ("with queue and ledger", BLUE)}
    _jobs_a_second(axis, rows, names)
    axis.set_title("short jobs through queue and ledger")
    labels = []
    for row in rows:
        what = "engine that costs nothing"
        if row["engine"] == "real":
            what = f"{row['engine_to_service']:.0%} of the engine's speed"
        labels.append(f"{SHORT.get(row['dtype'], row['dtype'])}, {row['jobs']} jobs\n{what}")
    axis.set_xticks(range(len(rows)), labels)


def _jobs_a_second(axis: Axes, rows: Sequence[Row], names: dict[str, tuple[str, str]]) -> None:
    """Bars of `row["jobs"]` over the median of each named run's seconds."""
    for i, (name, (label, color)) in enumerate(names.items()):
        speeds = [
            (x, row.number("jobs") / row.median("seconds", name))
            for x, row in enumerate(rows)
            if row["seconds"][name]
        ]
        bars = axis.bar(
            [x + (i - 0.5) * 0.38 for x, _ in speeds],
            [speed for _, speed in speeds],
            0.36,
            label=label,
            color=color,
        )
        axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
