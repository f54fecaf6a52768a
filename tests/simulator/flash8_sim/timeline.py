"""A launch's timeline as phases of each warpgroup, and as a picture.

The simulator records what happens in a logical time (src/timeline.h): stretches of instructions
with their counts by class, waits, products on the tensor cores, copies. From the counts follow the
phases: a stretch that computes in floating point between the products is softmax, one that issues
copies is the producer's work. Nothing of it is a speed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

WARPS = 4  # of a warpgroup

# Phases in the order in which a stretch of instructions is tried for them: classes that decide it.
_DECIDING = (
    ("issue copies", ("tma", "cp_async")),
    ("issue wgmma", ("wgmma",)),
    ("ldmatrix, stmatrix", ("matrix_move",)),
    ("store", ("store_global", "store_shared")),
    ("softmax", ("special_function", "float", "convert")),
)
COLORS = {
    "issue copies": "#7b4ea3",
    "issue wgmma": "#2166ac",
    "ldmatrix, stmatrix": "#c51b7d",
    "store": "#1b7837",
    "softmax": "#e08214",
    "other": "#d9d9d9",
    "wait for a barrier": "#f7f7f7",
    "wait for wgmma": "#fddbc7",
    "copy": "#c2a5cf",
}
_PRODUCTS = ("#4393c3", "#d6604d", "#35978f", "#762a83", "#01665e")
_SHORT = 24  # instructions: a shorter stretch without a phase of its own belongs to its neighbours


@dataclass(frozen=True)
class Phase:
    """What a lane does from `begin` to `end`; `line` is the PTX line of what is no stretch."""

    name: str
    begin: int
    end: int
    line: int = 0


@dataclass(frozen=True)
class Lane:
    """One row of the picture."""

    name: str
    phases: tuple[Phase, ...]


def lanes(trace: dict[str, Any], *, cta: int = 0) -> list[Lane]:
    """Rows for one CTA: copies; of each warpgroup its products, and who loads or does most.

    Raises ValueError when the trace has no events of that CTA.
    """
    events = [event for event in trace["traceEvents"] if event["pid"] == cta]
    if not events:
        raise ValueError(f"the timeline has no CTA {cta}; was `timeline` on during the launch?")
    copies = [_phase("copy", event) for event in events if event["cat"] == "engine"]
    result = [Lane("copies", tuple(copies))] if copies else []
    for group in sorted({event["tid"] // WARPS for event in events}):
        mine = [event for event in events if event["tid"] // WARPS == group]
        products = _merged(_phase(event["name"], event) for event in _of(mine, "tensor"))
        if products:
            result.append(Lane(f"tensor cores for warpgroup {group}", tuple(products)))
        busiest = max({event["tid"] for event in mine}, key=lambda tid: _instructions(mine, tid))
        loading = {event["tid"] for event in mine if "tma" in event["args"]}
        for warp in sorted(loading | {busiest}):
            phases = tuple(_warp_phases(mine, warp))
            result.append(Lane(f"warpgroup {group}, warp {warp}", phases))
    return result


def _of(events: Iterable[dict[str, Any]], category: str) -> list[dict[str, Any]]:
    return sorted((e for e in events if e["cat"] == category), key=lambda e: e["ts"])


def _phase(name: str, event: dict[str, Any]) -> Phase:
    return Phase(name, event["ts"], event["ts"] + event["dur"], event["args"].get("line", 0))


def _instructions(events: Iterable[dict[str, Any]], warp: int) -> int:
    runs = (e for e in events if e["cat"] == "run" and e["tid"] == warp)
    return sum(sum(e["args"].values()) for e in runs)


def _warp_phases(events: Sequence[dict[str, Any]], warp: int) -> Iterator[Phase]:
    mine = [event for event in events if event["tid"] == warp]
    runs = [_phase(_kind(event["args"]), event) for event in _of(mine, "run")]
    waits = [
        _phase("wait for wgmma" if e["name"] == "wgmma" else "wait for a barrier", e)
        for e in _of(mine, "wait")
    ]
    both = sorted([*runs, *waits], key=lambda phase: (phase.begin, phase.end))
    yield from _merged(_without_crumbs(_merged(both)))


def _kind(counts: dict[str, int]) -> str:
    for name, classes in _DECIDING:
        share = sum(counts.get(c, 0) for c in classes)
        if share and (name != "softmax" or 2 * share >= sum(counts.values())):
            return name
    return "other"


def _merged(phases: Iterable[Phase]) -> list[Phase]:
    """Neighbours of one name become one; products issued apart from each other stay apart."""
    result: list[Phase] = []
    for phase in phases:
        if result and result[-1].name == phase.name and result[-1].end >= phase.begin:
            result[-1] = replace(result[-1], end=max(result[-1].end, phase.end))
        else:
            result.append(phase)
    return result


def _without_crumbs(phases: Sequence[Phase]) -> list[Phase]:
    """A short stretch of address arithmetic takes the name of the phase before it."""
    result: list[Phase] = []
    for phase in phases:
        crumb = phase.name == "other" and phase.end - phase.begin < _SHORT
        if crumb and result and not result[-1].name.startswith("wait"):
            phase = replace(phase, name=result[-1].name)
        result.append(phase)
    return result


def _plain(name: str) -> str:
    """A product by its size, whatever its types."""
    return re.sub(r"^m(\d+)n(\d+)k(\d+)[^,]*", r"\1 x \2 x \3 product", name)


def draw(
    rows: Sequence[Lane],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    span: Sequence[int] | None = None,
) -> None:
    """Writes the picture, of all the time or of `span`. Raises ImportError where matplotlib is not
    installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from error
    colors = dict(COLORS)
    figure = Figure(figsize=(11, 0.55 * len(rows) + 1.3), layout="constrained")
    axes = figure.subplots()
    seen: dict[str, None] = {}
    begin, last = span or (0, max(phase.end for lane in rows for phase in lane.phases))
    for at, lane in enumerate(rows):
        for phase in lane.phases:
            if phase.end < begin or phase.begin > last:
                continue
            if phase.name not in colors:
                colors[phase.name] = _PRODUCTS[(len(colors) - len(COLORS)) % len(_PRODUCTS)]
            seen[phase.name] = None
            width = max(phase.end - phase.begin, (last - begin) / 800)
            axes.broken_barh(
                [(phase.begin, width)],
                (at - 0.38, 0.76),
                facecolor=colors[phase.name],
                edgecolor="#999999" if phase.name.startswith("wait") else "none",
                linewidth=0.3,
            )
    axes.set_yticks(range(len(rows)), [lane.name for lane in rows])
    axes.invert_yaxis()
    axes.set_xlim(begin, last)
    axes.set_xlabel("logical time: a warp's instructions, cycles of full-rate products; no speed")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", left=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    keys = [Patch(facecolor=colors[name], edgecolor="#999999", label=_plain(name)) for name in seen]
    figure.legend(
        handles=keys,
        loc="outside lower center",
        ncols=min(5, len(keys)),
        fontsize=8,
        frameon=False,
    )
    figure.savefig(Path(path), dpi=110)
