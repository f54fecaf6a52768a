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
from train import History, loss_gap

_OURS, _THEIRS, _INK, _FAINT = "#2166ac", "#b0b0b0", "#222222", "#cccccc"
_FP8 = "#d6604d"
_COLOURS = {"packed": _OURS, "padded": "#92c5de"}


def plot_losses(histories: list[History], path: Path, largest_gap: float) -> None:
    """The loss curves of all runs, and below how far each is from the first, in per cent."""
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 5.5), dpi=150, sharex=True, height_ratios=(5, 2)
    )
    for history, colour, style in zip(histories, (_OURS, _FP8), ("-", "--"), strict=True):
        kilobytes = [tokens / 1e3 for tokens in history.tokens]
        heldout = [tokens / 1e3 for tokens in history.heldout_tokens]
        label = f"{history.label}, held out: {history.heldout_losses[-1]:.3f}"
        above.plot(
            kilobytes, _running_mean(history.losses), style, color=colour, label=history.label
        )
        above.plot(heldout, history.heldout_losses, "o", color=colour, ms=4, label=label)
        if history is not histories[0]:
            _plot_gaps(below, history, histories[0], colour)
    above.set_ylabel("loss (nats per byte)")
    above.set_title("The same batches in bf16 and with an FP8 forward of attention", loc="left")
    above.set_ylim(0, 5.8)
    above.legend(frameon=False)
    percent = 100 * largest_gap
    below.axhspan(-percent, percent, color=_FAINT, alpha=0.4, linewidth=0)
    below.set_ylim(-1.5 * percent, 1.5 * percent)
    below.set_ylabel("difference (%)")
    below.set_xlabel("training text (kB)")
    below.set_xlim(left=0)
    for axes in (above, below):
        _finish(axes)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _plot_gaps(axes: Axes, history: History, reference: History, colour: str) -> None:
    """Of the running means of the training losses, and of the held-out losses."""

    def percent(ours: list[float], theirs: list[float]) -> list[float]:
        return [100 * (a / b - 1) for a, b in zip(ours, theirs, strict=True)]

    train = percent(_running_mean(history.losses), _running_mean(reference.losses))
    heldout = percent(history.heldout_losses, reference.heldout_losses)
    axes.plot([tokens / 1e3 for tokens in history.tokens], train, color=colour, linewidth=1)
    axes.plot([tokens / 1e3 for tokens in history.heldout_tokens], heldout, "o", color=colour, ms=4)


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
    """Steps, speed and losses of runs in lockstep; the difference is to the first row."""
    header = ("forward of attention", "steps", "bytes", "tokens/s", "first", "held out", "gap")
    body = [
        (
            history.label,
            f"{len(history.losses)}",
            f"{history.tokens[-1]:,}",
            f"{history.tokens[-1] / history.seconds:,.0f}",
            f"{history.heldout_losses[0]:.3f}",
            f"{history.heldout_losses[-1]:.4f}",
            "" if history is histories[0] else f"{loss_gap(history, histories[0]):+.2%}",
        )
        for history in histories
    ]
    return align([header, *body])


def cache_table(served: dict[str, dict[str, Any]]) -> str:
    """What each cache cost and what it did to the held-out loss; compared with the first row's."""
    header = ("cache", "MiB at most", "as dense rows", "held out", "gap", "logits", "ms a step")
    first = next(iter(served.values()))["heldout_loss"]
    body = [
        (
            label,
            f"{row['most_bytes'] / 2**20:.2f}",
            f"{row['dense_bytes'] / 2**20:.2f}",
            f"{row['heldout_loss']:.4f}",
            f"{row['heldout_loss'] / first - 1:+.3%}" if index else "",
            f"{row['largest_logit_difference']:.1e}",
            f"{1e3 * row['seconds_per_step']:.0f}",
        )
        for index, (label, row) in enumerate(served.items())
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
