"""Runs the snippets of docs/migration.md, one after the other, and looks up the names it gives."""

import importlib
import re
import sys

from flash8.compat import uninstall
from repository import ROOT

DOCUMENT = ROOT / "docs" / "migration.md"


def test_snippets():
    code = "\n".join(re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL))
    try:
        exec(compile(code, DOCUMENT.name, "exec"), {"__name__": "snippet"})
    finally:
        uninstall()
    assert "flash_attn" not in sys.modules


def test_modules_exist():
    names = set(re.findall(r"`(flash8\.compat[.\w]*\w)`", DOCUMENT.read_text()))
    assert len(names) >= 3
    for name in names:
        importlib.import_module(name)
