"""The law of the folders: none of the package imports one above it, no test file another, and no
script edits the path that it imports from."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flash8
from repository import ROOT, TESTS

PACKAGE = Path(flash8.__file__).parent
#: Ground first. What is not listed is the face: what users import, and the command line.
FLOORS = (
    ("tensors",),
    ("call",),
    ("backends.cpu", "compiler"),
    ("backends.hopper",),
    ("backends",),
    ("ops",),
)
FACE = len(FLOORS)
#: Of the face: what users import by its name, and no other module does.
LEAVES = ("distributed",)
#: Of the floor of its own: what may be imported by everyone.
OPEN = ("_native", "_version")


def floor_of(module: str) -> int:
    """The floor of a module, named within flash8: the one of its longest listed folder."""
    names = [(name, floor) for floor, row in enumerate(FLOORS) for name in row]
    found = [(name, floor) for name, floor in names if f"{module}.".startswith(f"{name}.")]
    return max(found, key=lambda pair: len(pair[0]))[1] if found else FACE


def imports(text: str) -> Iterator[str]:
    """The modules of flash8 that a source imports, and the names that it takes out of them."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name[len("flash8.") :] for name in found if name.startswith("flash8."))


def upward(module: str, text: str) -> list[str]:
    """What `module` imports from above it, or beside it from another folder of its floor."""
    own = floor_of(module)
    wrong = []
    for name in imports(text):
        if name.split(".")[0] in OPEN:
            continue
        floor = floor_of(name)
        stranger = own < FACE and floor == own and folder(name, own) != folder(module, own)
        if floor > own or stranger:
            wrong.append(name)
    return wrong


def folder(module: str, floor: int) -> str:
    return next(name for name in FLOORS[floor] if f"{module}.".startswith(f"{name}."))


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def test_no_folder_imports_back_up():
    wrong = {name: upward(name, path.read_text()) for name, path in modules()}
    assert {name: above for name, above in wrong.items() if above} == {}


def test_leaves_are_left_alone():
    wrong = {
        name: [x for x in imports(path.read_text()) if x.split(".")[0] in LEAVES]
        for name, path in modules()
        if name.split(".")[0] not in LEAVES
    }
    # The package itself has them as attributes, and imports them for type checkers only.
    assert {name: found for name, found in wrong.items() if found} == {"": [*LEAVES]}
    run = [node for node in ast.parse(Path(flash8.__file__).read_text()).body if not guarded(node)]
    assert not any(x in LEAVES for node in run for x in imports(ast.unparse(node)))
    assert {*LEAVES} < {name for name, _ in modules()}
    assert [*imports("from flash8.distributed import shard\n")] == ["distributed.shard"]


def guarded(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_every_floor_is_there():
    names = [name for name, _ in modules()]
    assert all(name in names for row in FLOORS for name in row)


def test_a_planted_import_is_found():
    planted = "from flash8.backends import hopper\nfrom flash8 import _native\n"
    assert upward("backends.cpu.forward", planted) == ["backends.hopper"]
    inside = "def f():\n    import flash8.ops.attention\n"
    assert upward("backends.hopper.forward", inside) == ["ops.attention"]
    assert upward("compiler.build", "from flash8.backends.cpu import mask\n") == [
        "backends.cpu.mask"
    ]
    assert upward("tensors.tokens", "from flash8 import attention\n") == ["attention"]
    assert upward("ops.attention", "from flash8.call.options import Options\n") == []


def strays(text: str) -> list[str]:
    """Test modules that a file imports, and its uses of the path."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("test_")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("test_"):
            found.append(node.module or "")
        elif isinstance(node, ast.Attribute) and is_path(node):
            found.append("sys.path")
    return found


def is_path(node: ast.Attribute) -> bool:
    return node.attr == "path" and isinstance(node.value, ast.Name) and node.value.id == "sys"


TEST_FILES = sorted(TESTS.rglob("test_*.py"))


def test_no_test_file_imports_another_and_no_script_edits_the_path():
    scripts = [
        path for name in ("bench", "examples", "tests") for path in (ROOT / name).rglob("*.py")
    ]
    assert {ROOT / "bench" / "facts.py", *TEST_FILES} < {*scripts}
    wrong = {str(path.relative_to(ROOT)): strays(path.read_text()) for path in scripts}
    assert {name: found for name, found in wrong.items() if found} == {}


def test_names_of_test_files_are_unique():
    names = [path.name for path in TEST_FILES if "simulator" not in path.parts]
    assert len(names) == len({*names})


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ("from test_checks import ones\n", ["test_checks"]),
        ("def f():\n    import test_checks\n", ["test_checks"]),
        ("import sys\nsys.path.insert(0, 'bench')\n", ["sys.path"]),
        ("from argument_cases import ones\n", []),
    ],
)
def test_a_planted_stray_is_found(planted, found):
    assert strays(planted) == found
