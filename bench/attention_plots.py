"""Pictures of bench/results/attention_*.json: rates of every case, and rates over the length.

Dense cases that differ by their length only, at least three of them, are curves in a picture of
their own, `<name>_length.png`; the others are dots. Decoding is in GB/s, the rest in TFLOP/s.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from plots import INK, OURS, SERIES, dots, lines, panels

Row = dict[str, Any]
_LEAST_LENGTHS = 3
_WHAT = {"forward": "forward", "both": "forward and backward"}
_OTHERS = (*SERIES[1:], "#b2182b", "#c2a5cf")


def draw(results: Row, label: Callable[[Row], str], path: Path) -> None:
    """Writes `path`, and `<name>_length.png` where there are cases for it."""
    timed = [row for row in results["rows"] if "forward" in row or "both" in row]
    families = _families(timed)
    in_families = {id(row) for rows in families.values() for row in rows}
    if families:
        _over_length(families, path.with_stem(f"{path.stem}_length"), _finding(timed))
    rest = [row for row in timed if id(row) not in in_families]
    if rest:
        _every_case(rest, label, path, _finding(rest))


def _families(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Dense cases that are the same but for length, batch and heads, by what they are and what was
    timed."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row, what in ((row, what) for what in _WHAT for row in rows if what in row):
        if row["kind"] == "dense":
            shared = "" if row["heads"] == row["heads_kv"] else ", grouped heads"
            mask = "causal" if row["causal"] else "no mask"
            name = f"{row['suite']}, d = {row['head_dim']}, {mask}{shared}"
            found.setdefault((name, what), []).append(row)
    return {
        family: same
        for family, same in found.items()
        if len({row["seqlen_q"] for row in same}) >= _LEAST_LENGTHS
    }


def _over_length(families: dict[tuple[str, str], list[Row]], path: Path, title: str) -> None:
    columns = min(2, len(families))
    heights = [1.0] * math.ceil(len(families) / columns)
    size = (5.5 * columns, 2.8 * len(heights) + 0.5)
    with panels(path, title, heights, columns, size) as axes:
        for panel, ((name, what), rows) in zip(axes, families.items(), strict=False):
            lengths = sorted({row["seqlen_q"] for row in rows})
            curves = {
                peer: [_value_at(rows, peer, what, n) for n in lengths] for peer in _peers(rows)
            }
            panel.set_xscale("log", base=2)
            most = max(value for curve in curves.values() for value in curve if value is not None)
            panel.set_ylim(0, 1.08 * most)
            lines(panel, lengths, curves, list(_colors(rows).values()))
            panel.set_xticks(lengths, [_tokens(n) for n in lengths])
            panel.set(xlabel="tokens", ylabel="TFLOP/s")
            panel.set_title(f"{name}: {_WHAT[what]}", loc="left", fontsize=10, color=INK)
        for panel in axes[len(families) :]:
            panel.remove()


def _every_case(rows: list[Row], label: Callable[[Row], str], path: Path, title: str) -> None:
    groups = [
        (suite, decoding, what)
        for what in _WHAT
        for suite, decoding in _once((row["suite"], row["kind"] == "decode") for row in rows)
        if any(_belongs(row, suite, decoding, what) for row in rows)
    ]
    members = [[row for row in rows if _belongs(row, *group)] for group in groups]
    heights = [1.2 + len(set(map(label, own))) for own in members]
    size = (9.0, 0.5 + 0.42 * sum(heights))
    colors = _colors(rows)
    with panels(path, title, heights, 1, size) as axes:
        for panel, (suite, decoding, what), own in zip(axes, groups, members, strict=True):
            cases, peers = list(_once(map(label, own))), list(_peers(own))
            series = {peer: _column(own, label, cases, peer, what) for peer in peers}
            last = panel is axes[-1]
            dots(panel, cases, series, [colors[peer] for peer in peers], legend=last)
            panel.set_xlim(left=0)
            unit = "GB/s" if decoding else "TFLOP/s"
            panel.set_title(f"{suite}: {_WHAT[what]}, {unit}", loc="left", fontsize=10, color=INK)


def _finding(rows: list[Row]) -> str:
    """How flash8 compares with the best of the others, over all that both have done."""
    ratios = []
    for what in _WHAT:
        for case in _once(_case(row) for row in rows):
            same = {
                row["peer"]: row[what]["median_ms"]
                for row in rows
                if _case(row) == case and what in row
            }
            others = [ms for peer, ms in same.items() if not peer.startswith("flash8")]
            if "flash8" in same and others:
                ratios.append(min(others) / same["flash8"])
    if not ratios:
        return "Nothing to compare flash8 with was measured"
    span = f"{min(ratios):.2g} to {max(ratios):.2g}"
    return f"flash8 is {span} times as fast as the best of the others"


def _case(row: Row) -> tuple[Any, ...]:
    names = ("suite", "kind", "batch", "seqlen_q", "seqlen_k", "heads", "heads_kv", "head_dim")
    return (*(row[name] for name in names), row["causal"], tuple(row["lengths"] or ()))


def _belongs(row: Row, suite: str, decoding: bool, what: str) -> bool:
    return row["suite"] == suite and (row["kind"] == "decode") == decoding and what in row


def _value(row: Row, what: str) -> float:
    if row["kind"] == "decode":
        return float(row["least_bytes"] / row[what]["median_ms"] * 1e-6)
    return float(row[what]["tflops"])


def _value_at(rows: list[Row], peer: str, what: str, seqlen: int) -> float | None:
    found = [row for row in rows if row["peer"] == peer and row["seqlen_q"] == seqlen]
    return _value(found[0], what) if found else None


def _column(
    rows: list[Row], label: Callable[[Row], str], cases: list[str], peer: str, what: str
) -> list[float]:
    """NaN, which is not drawn, where the peer did not do a case."""
    values = {label(row): _value(row, what) for row in rows if row["peer"] == peer}
    return [values.get(case, math.nan) for case in cases]


def _peers(rows: list[Row]) -> Iterable[str]:
    return _once(row["peer"] for row in rows)


def _colors(rows: list[Row]) -> dict[str, str]:
    """By peer, in the order in which they appear."""
    others = iter(_OTHERS * len(rows))
    return {peer: OURS if peer == "flash8" else next(others) for peer in _peers(rows)}


def _tokens(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 else str(n)


def _once(values: Iterable[Any]) -> Iterable[Any]:
    """Each once, in the order of its first appearance."""
    return dict.fromkeys(values)
