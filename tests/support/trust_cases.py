"""Wrong forward kernels, and what a call warns of."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flash8.backends.hopper import kernels
from flash8.compiler import Unit, compile_unit, cutlass_root, kernel_root
from fp8_forward_cases import changed_sources

Image = Callable[[kernels.KernelVariant], bytes]


def changed_image(folder: Path, *edits: tuple[str, str, str]) -> Image:
    """Forward kernels compiled from sources with (file, old, new) edits."""
    root = changed_sources(folder, *edits)

    def image(variant: kernels.KernelVariant) -> bytes:
        unit = variant.unit()
        source = root / unit.source.relative_to(kernel_root())
        changed = Unit(source, unit.defines, f"changed {variant.name}")
        return compile_unit(changed).ptx.read_bytes() + b"\0"

    return image


def changed_quantizers(folder: Path, name: str, old: str, new: str) -> Image:
    """Quantizer kernels compiled from sources with an edit of one file."""
    root = folder / "sources"
    shutil.copytree(kernel_root(), root)  # what they include
    shutil.copytree(cutlass_root() / "quantize", root, dirs_exist_ok=True)
    text = (root / name).read_text()
    assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}"
    (root / name).write_text(text.replace(old, new))

    def image(variant: kernels.KernelVariant) -> bytes:
        unit = variant.unit()
        changed = Unit(root / unit.source.name, unit.defines, f"changed {variant.name}")
        return compile_unit(changed).ptx.read_bytes() + b"\0"

    return image


def told(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call returns, and what it warns of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call()
    return result, [str(warning.message) for warning in found]
