"""Cubins that travel with the package: compiled ahead of time, one file per shipped unit.

The folder flash8/kernels holds <unit>.cubin and manifest.json, which says of each what it was made
from: the unit, the flags and every file of the device code. Where the device code beside it is
another, the cubin counts as absent, and the unit is compiled as if none had been shipped.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from flash8.compiler.build import NVCC_FLAGS, PTXAS_FLAGS, Unit
from flash8.compiler.store import digest
from flash8.compiler.toolchain import cutlass_root, kernel_root

if TYPE_CHECKING:
    from flash8.compiler import Compiled

_MANIFEST = "manifest.json"


def packaged_root() -> Path:
    """Where the package's own cubins are, if it has any."""
    return Path(__file__).resolve().parent.parent / "kernels"


def packaged_cubin(unit: Unit) -> Path | None:
    """The package's cubin of `unit`, if there is one and it was made from this device code."""
    made_from = _manifest(packaged_root()).get(unit.name)
    if made_from is None or made_from != _key(unit):
        return None
    cubin = packaged_root() / f"{unit.name}.cubin"
    return cubin if cubin.is_file() else None


def write_package(compiled: Sequence["Compiled"], folder: Path) -> None:
    """Write the cubins and their manifest into `folder`, for a wheel to carry.

    Raises ValueError for a unit without a name, or one that is no part of the device code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {}
    for result in compiled:
        if not result.unit.name:
            raise ValueError(f"{result.unit.label} has no name to ship it under")
        manifest[result.unit.name] = _key(result.unit)
        (folder / f"{result.unit.name}.cubin").write_bytes(result.cubin.read_bytes())
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


@cache
def _manifest(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / _MANIFEST).read_text()))
    except (OSError, ValueError):
        return {}


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
