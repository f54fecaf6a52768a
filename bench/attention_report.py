"""Markdown tables and plots of bench/results/attention_*.json, measured by bench_attention.py.

usage: python bench/attention_report.py    (rewrites the .md and the pictures beside each JSON)
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DEVICES = ("cuda", "cpu")
_MIB = 2**20
_HEADER = (
    *("shape", "peer", "forward ms", "20 to 80 %", "TFLOP/s", "of the matrix rate", "GB/s"),
    *("fwd+bwd ms", "TFLOP/s", "peak MiB", "scores MiB", "relL2", "relL2 of gradients"),
)


def main() -> None:
    for device in DEVICES:
        path = RESULTS / f"attention_{device}.json"
        if not path.exists():
            print(f"no results of {device} are committed: {path.name} does not exist")
            continue
        results = json.loads(path.read_text())
        text = tables(results)
        path.with_suffix(".md").write_text(text)
        print(text)
        _draw(results, path.with_suffix(".png"))


def _draw(results: dict[str, Any], path: Path) -> None:
    try:
        import attention_plots
    except ImportError:
        print(f"{path.name} is not drawn: there is no matplotlib")
        return
    attention_plots.draw(results, label, path)


def label(row: dict[str, Any]) -> str:
    """A case in a few words."""
    heads = f"h {row['heads']}/{row['heads_kv']}, d {row['head_dim']}"
    mask = ", causal" if row["causal"] and row["kind"] != "decode" else ""
    if row["kind"] == "packed":
        lengths = row["lengths"]
        total = sum(lengths)
        return f"packed {len(lengths)} of {min(lengths)} to {max(lengths)} = {total}, {heads}{mask}"
    if row["kind"] == "decode":
        return f"decode b {row['batch']}, cache {row['seqlen_k']}, {heads}"
    return f"b {row['batch']}, s {row['seqlen_q']}, {heads}{mask}"


def tables(results: dict[str, Any]) -> str:
    """One table per suite, the machine above and the peers that are missing below."""
    lines = [f"{describe(results)}\n"]
    for suite in _in_order(row["suite"] for row in results["rows"]):
        lines += [f"## {suite}\n", _line(_HEADER), _line("---" for _ in _HEADER)]
        rows = [row for row in results["rows"] if row["suite"] == suite]
        lines += [_line(_cells(row, results)) for row in rows] + [""]
    missing = [f"- {name}: {reason}" for name, reason in results.get("absent", {}).items()]
    return "\n".join([*lines, *(["Not measured:\n", *missing, ""] if missing else [])])


def describe(results: dict[str, Any]) -> str:
    facts = results["environment"]
    gpu = facts.get("gpu", {})
    machine = ", ".join(map(str, gpu.values())) if gpu else f"{facts['cpu']}, no GPU"
    rate = _matrix_tflops(results)
    measured = "" if rate is None else f", matrix products at {rate:.3g} TFLOP/s in the same run"
    changed = " and uncommitted changes" if facts["uncommitted_changes"] else ""
    return (
        f"{facts['date']}, {machine}, torch {facts['torch']}, {results['dtype']}{measured}, commit "
        f"{facts['commit'][:12]}{changed}"
    )


def _cells(row: dict[str, Any], results: dict[str, Any]) -> list[str]:
    cells = [label(row), row["peer"]]
    if "refused" in row:
        return [*cells, f"refused: {row['refused']}", *[""] * (len(_HEADER) - 3)]
    forward, both, rate = row.get("forward"), row.get("both"), _matrix_tflops(results)
    return [
        *cells,
        *([""] * 5 if forward is None else _forward_cells(row, forward, rate)),
        _if(both, lambda b: f"{b['median_ms']:.3g}")
        or _if(row.get("backward_refused"), lambda reason: f"refused: {reason}"),
        _if(both, lambda b: f"{b['tflops']:.3g}"),
        _if((forward or {}).get("peak_bytes"), lambda p: f"{p / _MIB:.0f}"),
        f"{row['score_bytes'] / _MIB:.0f}",
        f"{row['error']:.1e}",
        _if(row.get("gradient_error"), lambda e: f"{e:.1e}"),
    ]


def _forward_cells(row: dict[str, Any], forward: dict[str, Any], rate: float | None) -> list[str]:
    return [
        f"{forward['median_ms']:.3g}",
        _if(forward.get("p20_ms"), lambda p: f"{p:.3g} to {forward['p80_ms']:.3g}"),
        f"{forward['tflops']:.3g}",
        _if(rate, lambda r: f"{forward['tflops'] / r:.0%}"),
        f"{row['least_bytes'] / forward['median_ms'] * 1e-6:.3g}",
    ]


def _matrix_tflops(results: dict[str, Any]) -> float | None:
    """The better of the two measurements of a run."""
    measured = results.get("matrix_tflops")
    return None if measured is None else max(measured.values())


def _if(value: Any, text: Any) -> str:
    return "" if value is None else text(value)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _in_order(values: Iterable[Any]) -> Iterable[Any]:
    """Each once, in the order of its first appearance."""
    return dict.fromkeys(values)


if __name__ == "__main__":
    main()
