"""Kernels from source to cubin: one path, cached on disk.

`kernel_image` gives what the registry loads: a cubin that the package brought, or a compiled one.
`compile_unit` gives the PTX, the cubin and the report of a .cu file with its defines. It looks into
the cache first; FLASH8_COMPILE=never makes it look there only. The cache is FLASH8_CACHE, or
flash8/ in the user's cache folder.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from flash8.compiler.compilation import Compilation, find_anywhere, make_request
from flash8.compiler.errors import CompileError, CompilerNotFoundError, MissingVariantError
from flash8.compiler.packaged import packaged_cubin, write_package
from flash8.compiler.places import cache_root, printable
from flash8.compiler.process import time_limit
from flash8.compiler.progress import progress_line
from flash8.compiler.report import CompileReport, KernelCost, parse_log
from flash8.compiler.store import Entry, Request, Store
from flash8.compiler.toolchain import Toolchain, cutlass_root, find_toolchain, kernel_root
from flash8.compiler.unit import Unit, enumerator

__all__ = [
    "CompileError",
    "CompileReport",
    "Compiled",
    "CompilerNotFoundError",
    "KernelCost",
    "MissingVariantError",
    "Toolchain",
    "Unit",
    "cache_root",
    "compile_unit",
    "cutlass_root",
    "enumerator",
    "find_toolchain",
    "kernel_image",
    "kernel_root",
    "packaged_cubin",
    "parse_log",
    "write_package",
]


@dataclass(frozen=True)
class Compiled:
    """A compiled unit in the cache. `seconds` is 0 when it was there already."""

    unit: Unit
    folder: Path
    seconds: float

    @property
    def cubin(self) -> Path:
        return self.folder / "kernel.cubin"

    @property
    def ptx(self) -> Path:
        return self.folder / "kernel.ptx"

    @property
    def log(self) -> str:
        return (self.folder / "compile.log").read_text("utf-8")

    @property
    def report(self) -> CompileReport:
        return parse_log(self.log, self.ptx.read_text())


def compile_unit(unit: Unit, *, step: str = "") -> Compiled:
    """The compiled `unit`, from the cache or from the compiler.

    `step`, such as "3/13", goes before the unit on the progress line of a terminal. Threads and
    processes that ask for the same unit wait for the first of them, but not for longer than
    FLASH8_COMPILE_TIMEOUT (600 seconds), the time that each call of a compiler may take. A cache
    that cannot be written to is replaced by a private folder, with one warning.

    With FLASH8_COMPILE=never, or where there is no compiler, the cache serves what any compiler
    made of the device code as it is now.

    Raises MissingVariantError when the unit is not in the cache and FLASH8_COMPILE=never,
    CompilerNotFoundError when there is no compiler, CompileError when it refuses the source or
    takes too long, OSError when there is nowhere to compile.
    """
    return _obtain(unit, step)[0]


def kernel_image(unit: Unit, kind: str) -> bytes:
    """The "cubin" or the "ptx" of `unit`: the package's own cubin, else what `compile_unit` gives.

    Raises what `compile_unit` does.
    """
    shipped = packaged_cubin(unit) if kind == "cubin" else None
    if shipped is not None:
        return shipped.read_bytes()
    # The bytes whose digest was compared, not what a second look at the folder would find.
    return _obtain(unit, "")[1].files["kernel.cubin" if kind == "cubin" else "kernel.ptx"]


def _mode() -> str:
    mode = os.environ.get("FLASH8_COMPILE", "") or "auto"
    if mode not in ("auto", "never"):
        raise ValueError(f"FLASH8_COMPILE is {mode!r}; supported are 'auto' and 'never'")
    return mode


def _missing(unit: Unit, store: Store) -> MissingVariantError:
    trouble = store.trouble()
    which = printable(store.root) + (f", which is not used ({trouble})" if trouble else "")
    return MissingVariantError(
        f"{unit.label} is not in the cache {which}, and FLASH8_COMPILE=never; compile it "
        f"with `flash8 compile`, or unset FLASH8_COMPILE to compile it when it is first used"
    )


def _obtain(unit: Unit, step: str) -> tuple[Compiled, Entry]:
    mode, limit = _mode(), time_limit()
    if not unit.source.is_file():
        raise FileNotFoundError(f"source is {printable(unit.source)}; there is no such file")
    store = Store(cache_root())
    request = make_request(unit)
    if mode == "never":
        found = _found(unit, store, request)
        if found is None:
            raise _missing(unit, store)
        return found
    try:
        toolchain = find_toolchain()
    except CompilerNotFoundError:
        found = _found(unit, store, request)
        if found is None:
            raise
        return found
    request = make_request(unit, toolchain)
    entry = store.find(request)
    seconds = 0.0
    if entry is None:
        with progress_line(f"{step} {unit.label}".strip()) as tick:
            entry, seconds = Compilation(unit, toolchain, request, tick, limit).into(store)
    return Compiled(unit, entry.folder, seconds), entry


def _found(unit: Unit, store: Store, request: Request) -> tuple[Compiled, Entry] | None:
    """What any compiler has made of the unit before."""
    entry = find_anywhere(store, request)
    return None if entry is None else (Compiled(unit, entry.folder, 0.0), entry)
