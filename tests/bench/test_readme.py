"""What README.md says about kernels and accuracy is what the code and the stored results say."""

import json
import re

import pytest

import support_table
from repository import ROOT

README = (ROOT / "README.md").read_text()


def test_the_support_table_is_the_generated_one():
    assert support_table.with_table(README) == README, "run bench/support_table.py --write"


def test_a_kernel_that_refuses_changes_the_table(monkeypatch):
    from flash8.backends.hopper import forward

    row = support_table.ROWS[0]
    assert support_table.is_served(row)
    monkeypatch.setattr(forward, "refusal", lambda *_: "planted")
    assert not support_table.is_served(row)


def test_calls_of_one_row_end_alike():
    served = support_table.ROWS[0]
    refused = next(row for row in support_table.ROWS if not support_table.is_served(row))
    mixed = served._replace(calls=[*served.calls, *refused.calls])
    with pytest.raises(RuntimeError, match="some calls"):
        support_table.is_served(mixed)


def test_the_error_over_long_contexts_is_the_measured_one():
    results = json.loads((ROOT / "bench" / "results" / "fp8_accuracy.json").read_text())
    errors = {
        row["promotion"]: row["error"]
        for row in results["context_length"]
        if row["keys"] == 131_072
    }
    quoted = re.search(r"131,072 keys the error of O is\s+([\d.]+), against ([\d.]+)", README)
    assert quoted is not None
    assert quoted.groups() == (f"{errors[128]:.2g}", f"{errors['never']:.2g}")


def test_the_quick_start_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["out"].shape == (2, 512, 8, 64)


def test_the_commands_are_targets_of_make():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([\w-]+)", README))
    assert {"demo", "test"} <= named <= targets
