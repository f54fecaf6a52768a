"""The installed package is the checked-out one, whole, and its metadata agrees with itself."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import flash8
from repository import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def distribution() -> metadata.Distribution:
    """flash8's distribution, when the flash8 under test is an installed one."""
    try:
        found = metadata.distribution("flash8")
    except metadata.PackageNotFoundError:
        pytest.skip("flash8 is imported from its sources, not installed (use `make test`)")
    if not Path(flash8.__file__).samefile(found.locate_file("flash8/__init__.py")):
        pytest.skip("flash8 is imported from its sources, not from its installation")
    return found


def test_every_source_file_is_installed_unchanged(distribution):
    sources = ROOT / "python" / "flash8"
    for source in sources.rglob("*"):
        if source.suffix not in {".py", ".pyi", ".typed"}:
            continue
        installed = Path(distribution.locate_file("flash8")) / source.relative_to(sources)
        assert installed.read_bytes() == source.read_bytes(), f"{installed} is not {source}"


@pytest.mark.parametrize("folder", ["hopper", "cutlass_kernels"])
def test_the_device_code_is_installed_unchanged(distribution, folder):
    sources = ROOT / folder
    for source in filter(Path.is_file, sources.rglob("*")):
        installed = Path(distribution.locate_file(f"flash8/{folder}")) / source.relative_to(sources)
        assert installed.read_bytes() == source.read_bytes(), f"{installed} is not {source}"


def test_nothing_but_the_package_is_installed(distribution):
    tops = {path.parts[0] for path in distribution.files if path.parts[0] != ".."}
    assert tops == {"flash8", "flash8_cli", f"flash8-{flash8.__version__}.dist-info"}
    native = [path.name for path in distribution.files if path.suffix == ".so"]
    assert len(native) == 1
    assert native[0].startswith("_native.")


def test_version_has_one_source(distribution):
    assert distribution.version == flash8.__version__
    assert "version" not in PYPROJECT["project"]


def test_torch_is_the_only_runtime_dependency(distribution):
    runtime = [line for line in distribution.requires if "extra ==" not in line]
    assert [re.split(r"[<>=]", line)[0] for line in runtime] == ["torch"]


@pytest.mark.parametrize("extra", ["demo", "test", "dev"])
def test_constraints_pin_what_an_extra_asks_for(extra):
    pinned = {normalized(name) for name in PINS}
    for requirement in PYPROJECT["project"]["optional-dependencies"][extra]:
        name = normalized(re.split(r"[\[<>=]", requirement)[0])
        assert name in pinned or name == "flash8", f"constraints.txt does not pin {name}"


def test_constraints_pin_the_build_requirements_and_torch():
    names = {
        normalized(re.split("[<>=]", line)[0]) for line in PYPROJECT["build-system"]["requires"]
    }
    assert names | {"torch"} <= {normalized(name) for name in PINS}


def test_import_adds_nothing_of_cuda_and_no_plotting():
    code = (
        "import sys, torch; before = set(sys.modules); import flash8;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    added = run_python(code).split()
    assert "flash8" in added
    assert not {"matplotlib", "tqdm", "numpy", "scipy", "cuda", "triton", "hypothesis"} & set(added)


def test_import_leaves_kernels_and_their_compiler_to_the_first_call_that_wants_them():
    added = run_python("import sys, flash8; print(*sys.modules)").split()
    assert "flash8.backends.hopper.mode" in added  # which says whether a call does
    late = ("flash8._native", "flash8.compiler", "flash8.backends.hopper.")
    known = {"flash8.backends.hopper.mode"}
    assert {name for name in added if name.startswith(late)} <= known
