"""docs/fp8.md says what bench/results/fp8_accuracy.json holds, and that is as good as it was."""

import json

import pytest

from repository import ROOT

RESULTS = json.loads((ROOT / "bench" / "results" / "fp8_accuracy.json").read_text())


def test_the_document_quotes_the_stored_results():
    pytest.importorskip("matplotlib")
    import fp8_report

    text = (ROOT / "docs" / "fp8.md").read_text()
    assert fp8_report.with_tables(text, RESULTS) == text
    for name in fp8_report.PLOTS:
        assert f"images/fp8_{name}.png" in text
        assert (ROOT / "docs" / "images" / f"fp8_{name}.png").stat().st_size > 1000


@pytest.mark.parametrize("row", RESULTS["rmse_table"], ids=lambda row: row["method"])
def test_rmse_is_within_a_tenth_of_the_earlier_emulation(row):
    assert abs(row["rmse"] / row["emulated"] - 1.0) < 0.1
