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
from train import History

_OURS, _THEIRS, _INK, _FAINT = "#2166ac", "#b0b0b0", "#222222", "#cccccc"
_COLOURS = {"packed": _OURS, "padded": "#92c5de"}


def plot_loss(history: History, path: Path) -> None:
    """Training loss of every step, its running mean, and the held-out loss."""
    figure, axes = plt.subplots(figsize=(7, 4), dpi=150)
    kilobytes = [tokens / 1e3 for tokens in history.tokens]
    axes.plot(kilobytes, history.losses, color=_FAINT, linewidth=0.8, label="train, every batch")
    axes.plot(kilobytes, _running_mean(history.losses), color=_INK, label="train, running mean")
    heldout = [tokens / 1e3 for tokens in history.heldout_tokens]
    axes.plot(heldout, history.heldout_losses, "o-", color=_OURS, label="held-out documents")
    axes.annotate(
        f"{history.heldout_losses[-1]:.2f}",
        (heldout[-1], history.heldout_losses[-1]),
        textcoords="offset points",
        xytext=(0, -16),
        ha="center",
        color=_OURS,
    )
    axes.set_xlabel("training text (kB)")
    axes.set_ylabel("loss (nats per byte)")
    axes.set_title("Byte-level GPT on packed documents", loc="left")
    axes.set_ylim(0, 5.8)
    axes.set_xlim(left=0)
    _finish(axes)
    axes.legend(frameon=False)
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
