"""Pictures, the table and the files of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from measure import Measurement
from train import History, accuracy_gap

_OURS, _THEIRS = "#2166ac", "#b0b0b0"
_FP8 = "#d6604d"
_COLOURS = {"packed": _OURS, "padded": "#92c5de"}


def plot_training(histories: list[History], path: Path) -> None:
    """The share of right words of both runs, and their losses."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5.5), dpi=150, sharex=True)
    for history, colour, style in zip(histories, (_OURS, _FP8), ("-", "--"), strict=True):
        last = 100 * history.heldout_accuracies[-1]
        label = f"{history.label}: {last:.1f} %"
        heldout = [tokens / 1e3 for tokens in history.heldout_tokens]
        shares = [100 * share for share in history.heldout_accuracies]
        above.plot(heldout, shares, style, color=colour, marker="o", ms=4, label=label)
        kilo = [tokens / 1e3 for tokens in history.tokens]
        below.plot(kilo, _running_mean(history.losses), style, color=colour)
    last = [100 * history.heldout_accuracies[-1] for history in histories]
    title = f"bf16 and an FP8 forward end with {last[0]:.1f} % and {last[1]:.1f} % right words"
    above.set_title(title, loc="left", fontweight="bold")
    above.set_ylabel("right words, held out (%)")
    above.set_ylim(0, 105)
    above.legend(frameon=False, loc="lower right")
    below.set_ylabel("loss (nats per token)")
    below.set_ylim(bottom=0)
    below.set_xlabel("trained on (thousand words)")
    below.set_xlim(left=0)
    for axes in (above, below):
        _finish(axes)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def plot_comparison(rows: list[Measurement], path: Path) -> None:
    """Speed and memory of the variants, side by side."""
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(9, 3), dpi=150, sharey=True)
    labels = [row.label for row in rows]
    colours = [_COLOURS.get(row.variant, _THEIRS) for row in rows]
    rates = [row.tokens_per_second for row in rows]
    peaks = [row.peak_mib for row in rows]
    for axes, values, title in (
        (speed, rates, "training speed (real tokens per second)"),
        (memory, peaks, "peak memory above the imports (MiB)"),
    ):
        bars = axes.barh(labels, values, color=colours)
        axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3)
        axes.set_title(title, loc="left", fontsize=10)
        axes.margins(x=0.18)
        axes.xaxis.set_visible(False)
        axes.tick_params(left=False)
        axes.spines["bottom"].set_visible(False)
        _finish(axes)
    speed.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def table(rows: list[Measurement]) -> str:
    """The comparison as text; losses are compared with the first row's."""
    header = ("training", "tokens computed", "tokens/s", "peak MiB", "last loss", "loss gap")
    body = [
        (
            row.label,
            f"{row.computed_tokens / row.real_tokens:.2f} x real",
            f"{row.tokens_per_second:,.0f}",
            f"{row.peak_mib:,.0f}",
            f"{row.losses[-1]:.4f}",
            _bound(largest_gap(row, rows[0])) if row is not rows[0] else "",
        )
        for row in rows
    ]
    return align([header, *body])


def training_table(histories: list[History]) -> str:
    """Steps, speed and held-out results of runs in lockstep; the gap is to the first row."""
    header = ("forward of attention", "steps", "words", "words/s", "loss", "right words", "gap")
    body = [
        (
            history.label,
            f"{len(history.losses)}",
            f"{history.tokens[-1]:,}",
            f"{history.tokens[-1] / history.seconds:,.0f}",
            f"{history.heldout_losses[-1]:.4f}",
            f"{history.heldout_accuracies[-1]:.1%}",
            "" if history is histories[0] else f"{accuracy_gap(history, histories[0]):+.1%}",
        )
        for history in histories
    ]
    return align([header, *body])


def cache_table(served: dict[str, dict[str, Any]]) -> str:
    """What was written through each cache, and what that cost; the first row has none."""
    header = ("cache", "exact summaries", "right words", "MiB at most", "ms a step", "faster")
    slowest = next(iter(served.values()))["seconds_per_step"]
    body = [
        (
            label,
            f"{row['exact']} of {row['texts']}",
            f"{row['right_words']} of {row['words']}",
            f"{row['most_bytes'] / 2**20:.2f}" if "most_bytes" in row else "",
            f"{1e3 * row['seconds_per_step']:.1f}",
            f"{slowest / row['seconds_per_step']:.1f} x" if "most_bytes" in row else "",
        )
        for label, row in served.items()
    ]
    return align([header, *body])


def verdict(rows: list[Measurement]) -> str:
    """What the numbers say, whichever way they fell."""
    ours = rows[0]
    lines = []
    for row in rows[1:]:
        speed = ours.tokens_per_second / row.tokens_per_second
        memory = row.peak_mib / ours.peak_mib
        lines.append(
            f"{ours.label} against {row.label}: {_times(speed, 'faster', 'slower')}, "
            f"{_times(memory, 'less memory', 'more memory')}"
        )
    by_name = {row.variant: row for row in rows}
    if {"padded", "torch"} <= set(by_name):
        ratio = by_name["padded"].tokens_per_second / by_name["torch"].tokens_per_second
        lines.append(
            "on equal (padded) terms flash8 is "
            f"{_times(ratio, 'faster', 'slower')} than torch's fused attention here"
        )
    return "\n".join(lines)


def largest_gap(row: Measurement, other: Measurement) -> float:
    return max(abs(a - b) for a, b in zip(row.losses, other.losses, strict=True))


def align(rows: list[tuple[str, ...]], left: int = 1) -> str:
    """The first `left` columns to the left, the others to the right; a rule under the first row."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def write_json(results: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")


def _times(ratio: float, better: str, worse: str) -> str:
    return f"{ratio:.1f} x {better}" if ratio >= 1 else f"{1 / ratio:.1f} x {worse}"


def _bound(gap: float, floor: float = 1e-6) -> str:
    """A gap of fp32 losses; below `floor` the digits mean nothing."""
    return f"{gap:.1e}" if gap >= floor else f"< {floor:.0e}"


def _running_mean(values: list[float], width: int = 15) -> list[float]:
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
