"""Kernels from source to cubin: one path, cached on disk.

`kernel_image` gives what the registry loads: a cubin that the package brought, or a compiled one.
`compile_unit` gives the PTX, the cubin and the report of a .cu file with its defines. It looks into
the cache first; FLASH8_COMPILE=never makes it look there only. The cache is FLASH8_CACHE, or
flash8/ in the user's cache folder.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from flash8.compiler.build import NVCC_FLAGS, PTXAS_FLAGS, BuildResult, Unit, build
from flash8.compiler.errors import CompileError, CompilerNotFoundError, MissingVariantError
from flash8.compiler.packaged import packaged_cubin, write_package
from flash8.compiler.progress import progress_line
from flash8.compiler.report import CompileReport, KernelCost, parse_log
from flash8.compiler.store import Store, cache_root, digest
from flash8.compiler.toolchain import Toolchain, cutlass_root, find_toolchain, kernel_root

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
    "find_toolchain",
    "kernel_image",
    "kernel_root",
    "packaged_cubin",
    "parse_log",
    "write_package",
]

_ATTEMPTS = 3


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
        return (self.folder / "compile.log").read_text()

    @property
    def report(self) -> CompileReport:
        return parse_log(self.log, self.ptx.read_text())


def compile_unit(unit: Unit, *, step: str = "") -> Compiled:
    """The compiled `unit`, from the cache or from the compiler.

    `step`, such as "3/13", goes before the unit on the progress line of a terminal. Threads and
    processes that ask for the same unit wait for the first of them.

    Raises MissingVariantError when the unit is not in the cache and FLASH8_COMPILE=never,
    CompilerNotFoundError when there is no compiler, CompileError when it refuses the source.
    """
    mode = _mode()
    if not unit.source.is_file():
        raise FileNotFoundError(f"source is {unit.source}; there is no such file")
    store = Store(cache_root())
    try:
        toolchain = find_toolchain()
    except CompilerNotFoundError as error:
        if mode == "never":
            raise _missing(unit, store) from error
        raise
    request = _request(unit, toolchain)
    entry = store.find(request)
    if entry is not None:
        return Compiled(unit, entry, 0.0)
    if mode == "never":
        raise _missing(unit, store)
    with store.lock(request):
        entry = store.find(request)
        if entry is not None:
            return Compiled(unit, entry, 0.0)
        return _compile(unit, toolchain, store, request, step)


def kernel_image(unit: Unit, kind: str) -> bytes:
    """The "cubin" or the "ptx" of `unit`: the package's own cubin, else what `compile_unit` gives.

    Raises what `compile_unit` does.
    """
    shipped = packaged_cubin(unit) if kind == "cubin" else None
    if shipped is not None:
        return shipped.read_bytes()
    compiled = compile_unit(unit)
    return (compiled.cubin if kind == "cubin" else compiled.ptx).read_bytes()


def _mode() -> str:
    mode = os.environ.get("FLASH8_COMPILE", "") or "auto"
    if mode not in ("auto", "never"):
        raise ValueError(f"FLASH8_COMPILE is {mode!r}; supported are 'auto' and 'never'")
    return mode


def _missing(unit: Unit, store: Store) -> MissingVariantError:
    return MissingVariantError(
        f"{unit.label} is not in the cache {store.root}, and FLASH8_COMPILE=never; compile it "
        f"with `flash8 compile`, or unset FLASH8_COMPILE to compile it when it is first used"
    )


def _request(unit: Unit, toolchain: Toolchain) -> str:
    includes = [str(path) for path in (kernel_root(), *toolchain.include_dirs)]
    options = [*NVCC_FLAGS, *PTXAS_FLAGS, *includes, *unit.define_options()]
    return digest(toolchain.version, str(unit.source.resolve()), *options)


def _compile(unit: Unit, toolchain: Toolchain, store: Store, request: str, step: str) -> Compiled:
    start = time.monotonic()
    label = f"{step} {unit.label}".strip()
    for _ in range(_ATTEMPTS):
        with store.scratch() as folder, progress_line(label) as tick:
            began = time.time_ns()
            result = build(unit, toolchain, folder, tick)
            if _changed_since(began, result):
                continue
            (folder / "compile.log").write_text(result.log)
            entry = store.publish(request, result.headers, folder)
            return Compiled(unit, entry, time.monotonic() - start)
    raise CompileError(f"the files that {unit.label} reads keep changing while it compiles", "")


def _changed_since(began: int, result: BuildResult) -> bool:
    """Whether the digest of the headers could be of another text than the compiler saw."""
    now = time.time_ns()
    return any(began <= path.stat().st_mtime_ns <= now for path in result.headers)
