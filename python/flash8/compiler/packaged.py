"""Cubins that travel with the package: compiled ahead of time, one file per shipped unit.

The folder flash8/kernels holds <unit>.cubin and manifest.json, which says of each what it was made
from: the unit, the flags and every file of the device code. Where the device code beside it is
another, the cubin counts as absent, and the unit is compiled as if none had been shipped.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from flash8.compiler.build import NVCC_FLAGS, PTXAS_FLAGS
from flash8.compiler.store import digest
from flash8.compiler.toolchain import cutlass_root, kernel_root
from flash8.compiler.unit import Unit

if TYPE_CHECKING:
    from flash8.compiler import Compiled

_MANIFEST = "manifest.json"


def packaged_root() -> Path:
    """Where the package's own cubins are, if it has any."""
    return Path(__file__).resolve().parent.parent / "kernels"


def packaged_cubin(unit: Unit) -> Path | None:
    """The package's cubin of `unit`, if there is one, made from this device code, and whole."""
    said = _manifest(packaged_root()).get(unit.name)
    if said is None or said["made_from"] != _key(unit):
        return None
    cubin = packaged_root() / f"{unit.name}.cubin"
    try:
        return cubin if _sum(cubin.read_bytes()) == said["sha256"] else None
    except OSError:
        return None


def write_package(compiled: Sequence["Compiled"], folder: Path) -> None:
    """Write the cubins and their manifest into `folder`, for a wheel to carry.

    Raises ValueError for a unit without a name, or one that is no part of the device code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {}
    for result in compiled:
        if not result.unit.name:
            raise ValueError(f"{result.unit.label} has no name to ship it under")
        cubin = result.cubin.read_bytes()
        manifest[result.unit.name] = {"made_from": _key(result.unit), "sha256": _sum(cubin)}
        (folder / f"{result.unit.name}.cubin").write_bytes(cubin)
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _manifest(folder: Path) -> dict[str, dict[str, str]]:
    """The manifest's entry of each unit; units with another entry are left out."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(manifest, dict):
        return {}
    fields = {"made_from", "sha256"}
    return {
        name: said
        for name, said in manifest.items()
        if isinstance(said, dict) and said.keys() == fields
    }


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _key(unit: Unit) -> str:
    device_code = kernel_root().parent
    source = unit.source.resolve()
    if not source.is_relative_to(device_code):
        raise ValueError(f"{unit.source} is no part of the device code in {device_code}")
    options = [*NVCC_FLAGS, *PTXAS_FLAGS, *unit.define_options()]
    return digest(str(source.relative_to(device_code)), _device_code(), *options)


@cache
def _device_code() -> str:
    """A digest of all files of the device code, with their names."""
    parts: list[str | bytes] = []
    for root in (kernel_root(), cutlass_root()):
        for path in sorted(root.rglob("*")):
            if path.is_file():
                parts += [str(path.relative_to(root.parent)), path.read_bytes()]
    return digest(*parts)
