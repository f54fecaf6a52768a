"""Plots and tables of bench/results/fp8_accuracy.json. Called by fp8_accuracy.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
DOC = ROOT / "docs" / "fp8.md"
IMAGES = ROOT / "docs" / "images"
Rows = list[dict[str, Any]]
Results = dict[str, Any]


def write_report(results: Results) -> None:
    """Draws the plots and rewrites what stands between the markers of docs/fp8.md."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, draw in PLOTS.items():
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        draw(axes, results)
        figure.savefig(IMAGES / f"fp8_{name}.png", dpi=130)
        plt.close(figure)
    DOC.write_text(with_tables(DOC.read_text(), results))


def with_tables(text: str, results: Results) -> str:
    """`text` with every `<!-- table: name -->` ... `<!-- end -->` filled from `results`."""
    for name, table in TABLES.items():
        begin, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        head, _, rest = text.partition(begin)
        if not rest:
            raise ValueError(f"docs/fp8.md has no marker {begin.strip()!r}")
        tail = rest.partition(end)[2]
        text = f"{head}{begin}{table(results[name])}{end}{tail}"
    return text


# ------------------------------------------------------------------------------------- tables


def number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def plain(columns: dict[str, str]) -> Callable[[Rows], str]:
    """A table with these keys under these titles."""

    def table(rows: Rows) -> str:
        body = [[number(row[key]) for key in columns] for row in rows]
        return markdown(list(columns.values()), body)

    return table


def pivot(row_key: str, column_key: str, value: str, title: str) -> Callable[[Rows], str]:
    """A table of `value` with one line per row_key and one column per column_key."""

    def table(rows: Rows) -> str:
        lines = list(dict.fromkeys(row[row_key] for row in rows))
        columns = list(dict.fromkeys(row[column_key] for row in rows))
        found = {(row[row_key], row[column_key]): number(row[value]) for row in rows}
        body = [[number(line), *(found[line, column] for column in columns)] for line in lines]
        return markdown([title, *map(str, columns)], body)

    return table


def markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rmse_table(rows: Rows) -> str:
    body = [
        [
            row["method"],
            f"{row['rmse']:.2e}",
            f"{row['emulated']:.1e}",
            f"{row['rmse'] / row['emulated'] - 1:+.0%}",
            f"{row['paper']:.1e}",
        ]
        for row in rows
    ]
    return markdown(["method", "flash8", "emulated before", "difference", "paper"], body)


TABLES: dict[str, Callable[[Rows], str]] = {
    "rmse_table": rmse_table,
    "context_length": pivot("keys", "promotion", "error", "keys"),
    "smoothing": pivot("data", "method", "error", "K"),
    "p_reference": pivot("data", "p_scaling", "error", "data"),
    "gradients": plain(dict(backward="backward", dq="dQ", dk="dK", dv="dV")),
    "backward_operands": plain(
        dict(
            std="std of the logits",
            operands="operands",
            least_row_sum="least row sum of P",
            largest_row_sum="largest",
            dq_seen="dQ against the forward's inputs",
            dq_true="dQ against the unquantized inputs",
        )
    ),
    "key_bias": plain(dict(product="product", dq="dQ")),
    "cache": plain(
        dict(
            granularity="descales",
            dequantized="against the dequantized cache",
            total="against the unquantized cache",
        )
    ),
}


# -------------------------------------------------------------------------------------- plots


def draw_rmse(axes: Any, results: Results) -> None:
    rows = results["rmse_table"]
    places = range(len(rows))
    for offset, key, label in ((-0.2, "rmse", "flash8"), (0.2, "paper", "FA3 paper")):
        axes.barh([p + offset for p in places], [row[key] for row in rows], 0.38, label=label)
    axes.set_yticks(list(places), [row["method"] for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("RMSE, FA3's test data, 4096 keys, d = 128")
    axes.legend()


def draw_context_length(axes: Any, results: Results) -> None:
    rows = results["context_length"]
    for promotion in dict.fromkeys(row["promotion"] for row in rows):
        mine = [row for row in rows if row["promotion"] == promotion]
        named = isinstance(promotion, int)
        label = f"promoted every {promotion} keys" if named else str(promotion)
        label = "never promoted" if promotion == "never" else label
        axes.plot([r["keys"] for r in mine], [r["error"] for r in mine], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="keys", ylabel="relL2 of O, V of mean 0.5")
    axes.set_xscale("log", base=2)
    axes.legend()


def draw_smoothing(axes: Any, results: Results) -> None:
    grouped_bars(axes, results["smoothing"], "data", "method", "error")
    axes.set_ylabel("relL2 of O, causal, 2048 keys, d = 128")


def draw_p_reference(axes: Any, results: Results) -> None:
    grouped_bars(axes, results["p_reference"], "data", "p_scaling", "error")
    axes.set(yscale="log", ylabel="relL2 of O, only P rounded")


def draw_gradients(axes: Any, results: Results) -> None:
    rows = [
        dict(backward=row["backward"], gradient=name, error=row[name])
        for row in results["gradients"]
        for name in ("dq", "dk", "dv")
    ]
    grouped_bars(axes, rows, "backward", "gradient", "error")
    axes.set_ylabel("relL2 against float64, std-1 logits")
    axes.tick_params(axis="x", rotation=20)
    for label in axes.get_xticklabels():
        label.set(ha="right", fontsize=7)


def grouped_bars(axes: Any, rows: Rows, group: str, series: str, value: str) -> None:
    groups = list(dict.fromkeys(row[group] for row in rows))
    names = list(dict.fromkeys(row[series] for row in rows))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [
            row[value] for g in groups for row in rows if (row[group], row[series]) == (g, name)
        ]
        axes.bar([g + i * width for g in range(len(groups))], heights, width, label=name)
    middle = width * (len(names) - 1) / 2
    axes.set_xticks([g + middle for g in range(len(groups))], groups, fontsize=8)
    axes.legend(fontsize=8)


PLOTS: dict[str, Callable[[Any, Results], None]] = {
    "rmse": draw_rmse,
    "context_length": draw_context_length,
    "smoothing": draw_smoothing,
    "p_reference": draw_p_reference,
    "gradients": draw_gradients,
}
