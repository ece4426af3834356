"""Pictures of the newest figures: bench/results/*.jsonl to bench/results/plots/*.svg.

    python -m bench.plots [--results FOLDER] [--format svg|png]

One picture a question and device: throughput, adapters, breakdown, context, service, many, soak. Of
rows of the same question and conditions the last one counts. A question without rows gets no
picture.
Each picture says under what conditions its figures were measured. Raises RowError for rows that
cannot be read, SystemExit where there is nothing to draw.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from bench import pictures
from bench.picture_many import many
from bench.picture_soak import soak
from bench.record import RESULTS
from bench.rows import Row, newest, newest_figures, read_rows

Draw = Callable[[Sequence[Row]], Figure]
PICTURES: dict[str, tuple[Draw, tuple[str, ...]]] = {
    "throughput": (pictures.throughput, ("throughput",)),
    "adapters": (pictures.adapters, ("adapters",)),
    "breakdown": (pictures.breakdown, ("breakdown",)),
    "context": (pictures.context, ("context",)),
    "service": (pictures.service, ("prefix", "end_to_end")),
    "many": (many, ("many",)),
    "soak": (soak, ("soak",)),
}
"""Picture -> how to draw it, and the questions whose rows it takes."""

CONDITIONS = {
    "throughput": ("dtype", "threads", "max_seqs", "output_tokens", "adapters"),
    "adapters": ("dtype", "threads", "new_tokens", "batch"),
    "breakdown": ("dtype", "threads", "max_seqs", "max_step_tokens", "adapters"),
    "context": ("dtype", "batch", "adapters"),
    "prefix": ("dtype", "jobs", "prefix_tokens", "adapters"),
    "end_to_end": ("dtype", "jobs", "engine"),
    "many": ("dtype", "slots", "host_bytes"),
    "soak": ("database",),
}
"""What two rows of a question must agree in for the later one to replace the other."""

BY_NAME = {"throughput": "tokens_per_s", "adapters": "tokens_per_s"}
"""Fields whose figures are replaced one by one, because a row may hold some engines only."""

STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "lorabatch",
}


def rows_of(question: str, results: Path) -> list[Row]:
    """The rows of a question that count."""
    conditions = ("device", *CONDITIONS[question])
    rows = read_rows(question, results)
    if question in BY_NAME:
        return newest_figures(rows, conditions, BY_NAME[question])
    return newest(rows, conditions)


def caption(rows: Sequence[Row]) -> str:
    """Under which conditions the figures were measured."""
    dates = sorted(row.date for row in rows)
    first, last = (f"{date:%Y-%m-%d %H:%M}" for date in (dates[0], dates[-1]))
    torch = sorted({f"torch {row['versions']['torch']}" for row in rows if "versions" in row})
    parts = [rows[-1]["device"], *torch]
    threads = sorted({row["threads"] for row in rows if row.get("threads")})
    if threads:
        parts.append(f"{'/'.join(map(str, threads))} threads")
    repeats = sorted({row["repeats"] for row in rows if "repeats" in row})
    if repeats:
        low, high = repeats[0], repeats[-1]
        parts.append(f"medians of {low if low == high else f'{low} to {high}'} runs")
    return "; ".join([*parts, first if first == last else f"{first} to {last}"]) + " UTC"


def device_name(row: Row) -> str:
    """The device in few words, fit for a file's name."""
    words = str(row["device"]).partition("(")[0]
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def draw(results: Path, form: str = "svg", names: Iterable[str] = PICTURES) -> list[Path]:
    """Draw these, of what the folder has rows of; the pictures' paths."""
    made = []
    folder = results / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        picture, questions = PICTURES[name]
        by_device: dict[str, list[Row]] = {}
        for question in questions:
            for row in rows_of(question, results):
                by_device.setdefault(device_name(row), []).append(row)
        for device, rows in by_device.items():
            with plt.rc_context(STYLE):
                figure = picture(rows)
                lines = textwrap.wrap(caption(rows), int(14 * figure.get_figwidth()))
                figure.supxlabel("\n".join(lines), fontsize=8, color="#555555")
                path = folder / f"{name}-{device}.{form}"
                figure.savefig(path, dpi=110, metadata={"Date": None} if form == "svg" else None)
                plt.close(figure)
            made.append(path)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    args = parser.parse_args()
    made = draw(args.results, args.format)
    if not made:
        raise SystemExit(f"no rows in {args.results}: run a benchmark first, see bench/README.md")
    for path in made:
        print(path)


if __name__ == "__main__":
    main()
