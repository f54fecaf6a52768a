"""Runs the snippets of docs/training.md, one after the other."""

import re

from repository import ROOT

DOCUMENT = ROOT / "docs" / "training.md"


def test_snippets():
    snippets = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(snippets) == 6
    names = {"__name__": "snippet"}
    for number, code in enumerate(snippets, 1):
        exec(compile(code, f"{DOCUMENT.name}: snippet {number}", "exec"), names)
    assert all(x.grad is not None for x in names["block"].parameters())
    assert all(x.grad is not None for x in names["regular"].parameters())
    assert names["ordered"].attention.deterministic
