"""Runs the snippets of docs/integrations.md."""

import os
import re

import pytest

from repository import ROOT

DOCUMENT = ROOT / "docs" / "integrations.md"

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def sections():
    """{heading: all the Python of the section}."""
    found = {}
    for section in DOCUMENT.read_text().split("\n## ")[1:]:
        snippets = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        if snippets:
            found[section.splitlines()[0]] = "\n".join(snippets)
    return found


@pytest.mark.parametrize("heading", sections())
def test_snippets(heading):
    code = sections()[heading]
    if "transformers" in code:
        pytest.importorskip("transformers", reason="transformers is not installed")
    if "activate_flash_attention_impl" in code:
        pytest.importorskip("torch.nn.attention._registry", reason="torch is older than 2.11")
    exec(compile(code, f"{DOCUMENT.name}: {heading}", "exec"), {"__name__": "snippet"})
