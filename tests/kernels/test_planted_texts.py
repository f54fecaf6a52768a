"""Every text that a test replaces in the device code is there, once. Nothing is compiled."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flash8.compiler import cutlass_root, kernel_root
from repository import TESTS

ROOTS = (kernel_root(), cutlass_root() / "quantize", cutlass_root() / "gemm")
DEVICE = (".cu", ".cuh", ".h")


def called(node: ast.AST) -> set[str]:
    """Names of the functions that a piece of source calls."""
    calls = (call.func for call in ast.walk(node) if isinstance(call, ast.Call))
    return {getattr(function, "id", getattr(function, "attr", "")) for function in calls}


def editors() -> set[str]:
    """Functions of tests/support that copy a folder, or call one that does: the copies of device
    code with edits."""
    trees = [ast.parse(path.read_text()) for path in (TESTS / "support").rglob("*.py")]
    functions = [node for tree in trees for node in ast.walk(tree)]
    calls: dict[str, set[str]] = {}
    for node in functions:
        if isinstance(node, ast.FunctionDef):  # of this name there may be others elsewhere
            calls.setdefault(node.name, set()).update(called(node))
    found = {"copytree"}
    while more := {name for name, names in calls.items() if names & found} - found:
        found |= more
    return found - {"copytree"}


EDITORS = editors()


def plants(path: Path) -> bool:
    """Whether it edits files, and names one of device code."""
    text = path.read_text()
    names_one = any(f'{suffix}"' in text for suffix in DEVICE)
    return names_one and bool(called(ast.parse(text)) & EDITORS)


PLANTING = {path.stem: path for path in sorted(TESTS.rglob("test_*.py")) if plants(path)}


def value(node: ast.expr, names: dict[str, Any]) -> Any:
    """What a constant, a name or an f-string of names has as its value; None of all else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.JoinedStr):
        parts = [value(part, names) for part in node.values]
        return None if None in parts else "".join(map(str, parts))
    return value(node.value, names) if isinstance(node, ast.FormattedValue) else None


def scopes(tree: ast.Module, names: dict[str, Any]) -> Iterator[tuple[ast.AST, dict[str, Any]]]:
    """Functions with the names that they assign, and behind them the module."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            inside = dict(names)
            for node in ast.walk(function):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    inside[node.targets[0].id] = value(node.value, inside)
            yield function, inside
    yield tree, names


def names_of(path: Path) -> dict[str, Any]:
    """What a module defines."""
    spec = importlib.util.spec_from_file_location(f"planting_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def planted(path: Path) -> dict[int, tuple[str, Any]]:
    """File and text by line, of every tuple (file, old, new) of a module."""
    tree = ast.parse(path.read_text())
    found: dict[int, tuple[str, Any]] = {}
    for scope, names in scopes(tree, names_of(path)):
        for node in ast.walk(scope):
            if not isinstance(node, ast.Tuple) or len(node.elts) < 3:
                continue
            file, old = (value(element, names) for element in node.elts[:2])
            is_edit = isinstance(file, str) and file.endswith(DEVICE)
            if is_edit and not (isinstance(old, str) and old.endswith(DEVICE)):
                found.setdefault(node.lineno, (file, old))
    return found


@pytest.mark.parametrize("module", PLANTING)
def test_planted_texts_occur_once(module):
    texts = planted(PLANTING[module])
    assert texts, "no tuple (file, old, new) is found"
    for line, (file, old) in texts.items():
        where = f"{module}.py:{line}: {file}"
        assert isinstance(old, str), f"{where}: the text cannot be read without a run"
        counts = [(root / file).read_text().count(old) for root in ROOTS if (root / file).is_file()]
        assert counts == [1], f"{where} has {counts} times {old!r}"


def test_the_modules_are_found():
    known = {"test_trust", "test_quantizer_mutations", "test_forward_kernel_hidden"}
    assert {*known, "test_decode_mutations", "test_decode_team_mutations"} <= {*PLANTING}
