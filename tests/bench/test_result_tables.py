"""Tables that scripts write into bench/results are the ones in the documents."""

import pytest

from repository import DOCS, ROOT

RESULTS = ROOT / "bench" / "results"


def rows_of(text):
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize(
    "table, document",
    [
        ("machine_code.md", "forward.md"),
        ("cycle_model.md", "forward.md"),
        ("tile_order.md", "forward.md"),
        ("machine_code_backward.md", "backward.md"),
        ("quantizer_traffic.md", "fp8.md"),
    ],
)
def test_the_document_quotes_the_results(table, document):
    rows = rows_of((RESULTS / table).read_text())
    assert len(rows) > 2
    quoted = rows_of((DOCS / document).read_text())
    assert [row for row in rows if row not in quoted] == []


def test_the_counts_of_v_layouts_are_the_measured_ones():
    """The document names the kernels otherwise; the numbers of a row are in the same order."""
    measured = [row.split("|")[2:] for row in rows_of((RESULTS / "v_layouts.md").read_text())[2:]]
    quoted = [row.split("|")[2:] for row in rows_of((DOCS / "forward.md").read_text())]
    assert measured and all(numbers in quoted for numbers in measured)
