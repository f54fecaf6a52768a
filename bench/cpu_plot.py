"""The picture of bench/results/cpu.json: rates of flash8 and of torch's SDPA over the length.

usage: python bench/cpu_plot.py    (rewrites docs/images/cpu_length.png)
"""

import json
import re
from pathlib import Path
from typing import Any

from plots import NEUTRAL, OURS, lines, panels

HERE = Path(__file__).resolve().parent
IMAGE = HERE.parent / "docs" / "images" / "cpu_length.png"
#: Squares under a causal mask with as many KV heads as heads.
_CASE = re.compile(r"1 x (\d+), h (\d+)/\2, causal")
_PRODUCTS = {"forward": 2, "forward and backward": 7}
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def rates(rows: list[dict[str, Any]], what: str, dtype: str) -> dict[int, dict[str, float]]:
    """GFLOP/s by length and by whose."""
    found = {}
    for row in rows:
        case = _CASE.fullmatch(row["case"])
        if case and row["what"] == what and row["dtype"] == dtype:
            length, heads = int(case[1]), int(case[2])
            flops = _PRODUCTS[what] * length**2 * heads * 64  # half of the scores are seen
            found[length] = {name: flops / ms * 1e-6 for name, ms in row["ms"].items()}
    return found


def title(rows: list[dict[str, Any]]) -> str:
    ratios = [
        rate["flash8"] / rate["SDPA"]
        for dtype in _DTYPES
        for what in _PRODUCTS
        for rate in rates(rows, what, dtype).values()
    ]
    least, most = min(ratios), max(ratios)
    return f"On a CPU flash8 is {least:.2g} to {most:.2g} times as fast as torch's SDPA"


def draw(results: dict[str, Any]) -> None:
    rows = results["rows"]
    with panels(IMAGE, title(rows), [1.0, 1.0], 2, (11.0, 6.4)) as axes:
        kinds = [(what, dtype) for dtype in _DTYPES for what in _PRODUCTS]
        for panel, (what, dtype) in zip(axes, kinds, strict=True):
            by_length = rates(rows, what, dtype)
            lengths = sorted(by_length)
            panel.set_xscale("log", base=2)
            curves = {who: [by_length[n][who] for n in lengths] for who in ("flash8", "SDPA")}
            panel.set_ylim(0, 1.1 * max(max(curve) for curve in curves.values()))
            lines(panel, lengths, curves, (OURS, NEUTRAL))
            panel.set_xticks(lengths, [f"{n:,}" for n in lengths])
            panel.set(xlabel="tokens (causal, d = 64, one thread)", ylabel="GFLOP/s")
            panel.set_title(f"{_DTYPES[dtype]}, {what}", loc="left", fontsize=10)


if __name__ == "__main__":
    draw(json.loads((HERE / "results" / "cpu.json").read_text()))
