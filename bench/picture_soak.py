"""The picture of `tests.faults.soak`: what the worker that lives through it takes, by minute."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.pictures import BLUE, GREEN, GREY, ORANGE, PURPLE
from bench.rows import Row

NAMES = {"postgresql": "PostgreSQL", "sqlite": "SQLite"}
PANELS = (
    ("MB", (("rss_mb", "worker, resident", BLUE), ("broker_mb", "broker, used", ORANGE))),
    ("of the worker", (("fds", "file descriptors", GREEN), ("threads", "threads", PURPLE))),
    ("jobs", (("open_jobs", "queued or running", BLUE),)),
)


def soak(rows: Sequence[Row]) -> Figure:
    """A column for each database: memory; file descriptors and threads; jobs that wait or run."""
    figure, axes = plt.subplots(
        len(PANELS),
        len(rows),
        figsize=(max(6.5 * len(rows), 7.5), 7.0),
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for column, row in zip(axes.T, rows, strict=True):
        for axis, (label, lines) in zip(column, PANELS, strict=True):
            _panel(axis, row, label, lines)
        column[0].set_title(_title(row))
        column[-1].set_xlabel("minutes")
    return figure


def _panel(axis: Axes, row: Row, label: str, lines: Sequence[tuple[str, str, str]]) -> None:
    seen = row["series"]
    for name, words, colour in lines:
        axis.plot(seen["minutes"], seen[name], color=colour, label=words, linewidth=1.4)
    warm = row["survivor"]["warm_minutes"]
    axis.axvline(warm, color=GREY, linestyle=":", linewidth=1.0)
    axis.set_ylim(0, 1.3 * max(max(seen[name]) for name, _, _ in lines))
    axis.set_xlim(left=0)
    axis.set_ylabel(label)
    axis.legend(loc="upper right", ncols=len(lines))


def _title(row: Row) -> str:
    faults = sum(row.figures("faults").values())
    grown = row["survivor"]["rss_mb_grown"]
    database = NAMES.get(row["database"], row["database"])
    return (
        f"{database}: {row['jobs']:,} jobs, {faults:,.0f} faults, "
        f"{row['lost']} lost, {row['duplicated']} twice\n"
        f"the worker that is never replaced: {grown:+.1f} MB after its warm-up (dotted)"
    )
