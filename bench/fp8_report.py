"""Plots and tables of bench/results/fp8_accuracy.json. Called by fp8_accuracy.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from plots import BAD, GOOD, NEUTRAL, OURS, dots, lines, picture

ROOT = Path(__file__).parent.parent
DOC = ROOT / "docs" / "fp8.md"
IMAGES = ROOT / "docs" / "images"
Rows = list[dict[str, Any]]
Results = dict[str, Any]


def write_report(results: Results) -> None:
    """Draws the plots and rewrites what stands between the markers of docs/fp8.md."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, (title, draw) in PLOTS.items():
        with picture(IMAGES / f"fp8_{name}.png", title) as axes:
            draw(axes, results)
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
    series = {"FA3 paper": [row["paper"] for row in rows], "flash8": [row["rmse"] for row in rows]}
    dots(axes, [row["method"] for row in rows], series, (NEUTRAL, OURS))
    axes.set(xscale="log", xlabel="RMSE of O on FA3's test data, 4096 keys, d = 128")


def draw_context_length(axes: Any, results: Results) -> None:
    rows = results["context_length"]
    keys = sorted({row["keys"] for row in rows})
    errors = {(row["keys"], row["promotion"]): row["error"] for row in rows}
    names = {"never": "never promoted", 2048: "every 2048 keys", 512: "every 512 keys"}
    names |= {128: "every 128 keys: flash8", "fp32 sums": "sums in fp32"}
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="keys", ylabel="relL2 of O, V of mean 0.5", ylim=(4e-4, 1))
    curves = {name: [errors[n, promotion] for n in keys] for promotion, name in names.items()}
    lines(axes, keys, curves, (BAD, "#e08214", "#8073ac", OURS, NEUTRAL))
    axes.set_xticks(keys, [f"{n // 1024}k" for n in keys])


def draw_smoothing(axes: Any, results: Results) -> None:
    data, errors = grouped(results["smoothing"], "data", "method")
    errors = {"neither": errors.pop("none"), **errors}
    dots(axes, data, errors, (BAD, OURS, "#e08214", GOOD))
    axes.set(xlim=(0, None), xlabel="relL2 of O, causal, 2048 keys, d = 128")


def draw_p_reference(axes: Any, results: Results) -> None:
    data, errors = grouped(results["p_reference"], "data", "p_scaling")
    names = {"none": "P as it is", "running_max": "by the running maximum"}
    names |= {"block_local": "by the block's maximum: flash8"}
    dots(axes, data, {names[key]: values for key, values in errors.items()}, (BAD, NEUTRAL, OURS))
    axes.set(xscale="log", xlabel="relL2 of O, only P rounded to e4m3")


def draw_gradients(axes: Any, results: Results) -> None:
    rows = results["gradients"]
    series = {f"d{x.upper()}": [row[f"d{x}"] for row in rows] for x in "qkv"}
    names = {
        "16bit": "16 bits",
        "16bit, block scales": "16 bits, block scales",
        "16bit, Hadamard and smooth K": "16 bits, Hadamard and smooth K",
        "fp8_scores": "S and dP in FP8",
        "fp8_scores_dv": "S, dP and dV in FP8",
        "fp8": "all five products in FP8",
        "fp8, e5m2 gradients": "all five, gradients in e5m2",
        "fp8_scores_dv, P not scaled": "S, dP and dV in FP8, P not scaled",
    }
    dots(axes, [names[row["backward"]] for row in rows], series)
    axes.set(xscale="log", xlabel="relL2 against float64, std-1 logits")
    axes.set_xticks([0.04, 0.06, 0.1, 0.2, 0.3], ["0.04", "0.06", "0.1", "0.2", "0.3"])
    axes.minorticks_off()


def grouped(rows: Rows, group: str, series: str) -> tuple[list[str], dict[str, list[float]]]:
    """The groups, and of each series the error in every group."""
    errors = {(row[group], row[series]): row["error"] for row in rows}
    groups = list(dict.fromkeys(row[group] for row in rows))
    names = dict.fromkeys(row[series] for row in rows)
    return groups, {name: [errors[g, name] for g in groups] for name in names}


PLOTS: dict[str, tuple[str, Callable[[Any, Results], None]]] = {
    "rmse": ("Rotation halves the error of FP8 with block scales", draw_rmse),
    "context_length": (
        "Promoted every 128 keys, FP8 does not get worse with the context",
        draw_context_length,
    ),
    "smoothing": (
        "A bias of K's channels costs next to nothing once K is smoothed",
        draw_smoothing,
    ),
    "p_reference": (
        "P scaled by its own block is as exact wherever a sink lies",
        draw_p_reference,
    ),
    "gradients": ("Each product in FP8 costs the gradients a little", draw_gradients),
}
