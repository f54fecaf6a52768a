"""How pictures look: a title that says the finding, units, labels beside what they name.

Lengths of bars begin at zero, so where values differ by powers of ten they are dots on a line.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OURS, BAD, GOOD, NEUTRAL = "#2166ac", "#d6604d", "#4d9221", "#8c8c8c"
SERIES = (OURS, "#e08214", "#35978f", "#8073ac", NEUTRAL)
INK, FAINT = "#222222", "#dddddd"
STYLE = {
    "font.size": 10,
    "axes.edgecolor": NEUTRAL,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


@contextmanager
def picture(path: Path, title: str, size: tuple[float, float] = (7.5, 4.0)) -> Iterator[Any]:
    """The axes of a figure under a title; it is written at the end."""
    with panels(path, title, [1.0], 1, size) as axes:
        yield axes[0]


@contextmanager
def panels(
    path: Path, title: str, heights: Sequence[float], columns: int, size: tuple[float, float]
) -> Iterator[Sequence[Any]]:
    """As `picture`, of rows of so many panels with these heights to each other; row by row."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(heights),
            columns,
            figsize=size,
            height_ratios=heights,
            squeeze=False,
            layout="constrained",
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        yield list(axes.flat)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def lines(
    axes: Any,
    x: Sequence[float],
    curves: Mapping[str, Sequence[float | None]],
    colors: Sequence[str] = SERIES,
) -> None:
    """Curves over x, each named at its end. None: it was not measured there."""
    ends = []
    for (name, values), color in zip(curves.items(), colors, strict=False):
        points = [(a, b) for a, b in zip(x, values, strict=True) if b is not None]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=color)
        ends.append((points[-1], name, color))
    heights = _apart(axes, [end[1] for end, _, _ in ends])
    for ((at, value), name, color), height in zip(ends, heights, strict=True):
        axes.annotate(
            name,
            (at, value),
            xytext=(8, height),
            textcoords="offset points",
            color=color,
            va="center",
            annotation_clip=False,
        )
    axes.grid(axis="y", linewidth=0.6)
    axes.margins(x=0.02)


def _apart(axes: Any, values: list[float], points: float = 13.0) -> list[float]:
    """How far in points to move texts at these heights, so that none covers another."""
    scale = axes.get_figure().dpi / 72
    places = [axes.transData.transform((1, value))[1] / scale for value in values]
    moved = dict(enumerate(places))
    lowest = float("-inf")
    for i in sorted(moved, key=lambda i: places[i]):
        moved[i] = lowest = max(places[i], lowest + points)
    return [moved[i] - places[i] for i in range(len(values))]


def dots(
    axes: Any,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    colors: Sequence[str] = SERIES,
    *,
    legend: bool = True,
) -> None:
    """A row for each group and a dot for each series, which a legend below names. Dots of one row
    lie one below the other, so that equal ones are seen."""
    for row in range(len(groups)):
        axes.axhline(row, color=FAINT, linewidth=0.8, zorder=1)
    for i, ((name, values), color) in enumerate(zip(series.items(), colors, strict=False)):
        below = 0.16 * (i - (len(series) - 1) / 2)
        places = [row + below for row in range(len(groups))]
        axes.scatter(values, places, s=40, color=color, label=name, zorder=2)
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.tick_params(axis="y", left=False)
    axes.grid(axis="x", linewidth=0.6)
    axes.spines["left"].set_visible(False)
    if legend:
        below = -40 / axes.get_window_extent().height
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, below), ncols=len(series), fontsize=9)
