"""The pack: what `make gpu-pack` builds here so that a GPU machine compiles no kernel.

site/         flash8 as installed, its device code, and the cubins under flash8/kernels
facts/        the kernels of bench/hopper_facts, cubin and PTX
tests/        the kernels of tests/gpu/gpu_driver.cu
pybind11/     headers, for an extension built where the Python is another
pack.json     commit, digest of the sources, kernels
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PACK = ROOT / "build" / "gpu-pack"
#: What a pack is made from: files of these kinds in folders, and files that say which kernels.
_FOLDERS = {
    "python": (".py", ".pyi", ".h", ".cpp"),
    "hopper": (".h", ".cuh", ".cu"),
    "cutlass_kernels": (".h", ".cuh", ".cu"),
    "bench/hopper_facts": (".cu",),
}
_FILES = (
    "CMakeLists.txt",
    "bench/attention_cases.py",
    "bench/bench_backward_choices.py",
    "bench/bench_choices.py",
    "bench/bench_gemm_choices.py",
    "bench/gpu_steps/units.py",
    "tests/gpu/gpu_driver.cu",
)


class PackError(RuntimeError):
    """There is no pack, or it is of other sources."""


@dataclass(frozen=True)
class Pack:
    folder: Path
    manifest: dict[str, Any]

    @property
    def site(self) -> Path:
        return self.folder / "site"

    @property
    def facts(self) -> Path:
        return self.folder / "facts"

    @property
    def kernels(self) -> list[str]:
        """Names of the shipped kernels, in the order of `flash8 check`."""
        return list(self.manifest["kernels"])


def open_pack(folder: Path, *, root: Path = ROOT) -> Pack:
    """Raises PackError, which says what to do."""
    try:
        manifest = json.loads((folder / "pack.json").read_text())
    except (OSError, ValueError) as error:
        raise PackError(f"there is no pack in {folder} ({error}): run `make gpu-pack`") from None
    if manifest.get("sources") != source_digest(root):
        raise PackError(f"{folder} was made from other sources: run `make gpu-pack` again")
    return Pack(folder, manifest)


def source_digest(root: Path = ROOT) -> str:
    """Of every file that the pack depends on, with its name."""
    paths = [*(root / name for name in _FILES), *gpu_tests(root)]
    for name, suffixes in _FOLDERS.items():
        paths += [path for path in (root / name).rglob("*") if path.suffix in suffixes]
    found = hashlib.sha256()
    for path in sorted(paths):
        if path.is_file():
            found.update(str(path.relative_to(root)).encode() + b"\0")
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def gpu_tests(root: Path = ROOT) -> list[Path]:
    """The files of tests that need a GPU: those with the mark."""
    files = sorted((root / "tests" / "gpu").glob("test_*.py"))
    return [path for path in files if "pytest.mark.gpu" in path.read_text()]


def native_sources(root: Path = ROOT) -> list[Path]:
    """The sources of the extension, as CMakeLists.txt lists them."""
    return _listed(root, "pybind11_add_module(_native")


def native_includes(root: Path = ROOT) -> list[Path]:
    """The folders where they look for headers, likewise."""
    return _listed(root, "target_include_directories(_native PRIVATE")


def _listed(root: Path, command: str) -> list[Path]:
    found = (root / "CMakeLists.txt").read_text().partition(command)[2].partition(")")[0].split()
    assert found, f"CMakeLists.txt has no {command!r}"
    return [root / name for name in found]
