"""The front end without a host compiler: NVRTC, through cuda-python's bindings.

nvcc asks a host compiler to preprocess even device code; NVRTC does not, but has no C++ standard
library. The few standard headers that the device code includes are given to it here, over libcu++.
"""

import importlib.util
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash8.compiler.errors import CompileError
from flash8.compiler.toolchain import Toolchain, cutlass_root, kernel_root

if TYPE_CHECKING:
    from flash8.compiler.build import BuildResult, Tick, Unit

FLAGS = (
    "-arch=compute_90a",
    "-std=c++17",
    "-default-device",
    "--use_fast_math",
    "-DNDEBUG",
    "-DINFINITY=__int_as_float(0x7f800000)",
)
_INTEGERS = " ".join(f"using ::{s}int{n}_t;" for n in (8, 16, 32, 64) for s in ("", "u"))
_STANDARD_HEADERS = {
    "cstdint": f"namespace std {{ {_INTEGERS} using ::uintptr_t; }}",
    "cstddef": "namespace std { using ::size_t; using ::ptrdiff_t; }",
    "type_traits": "namespace std { using namespace cuda::std; }",
}


def is_installed() -> bool:
    """Whether cuda-python's bindings can be imported."""
    try:
        return importlib.util.find_spec("cuda.bindings.nvrtc") is not None
    except ImportError:
        return False


def compile_ptx(unit: "Unit", toolchain: Toolchain, ptx: Path, tick: "Tick") -> "BuildResult":
    """Compile `unit` into the file `ptx`. Raises CompileError with NVRTC's own words.

    NVRTC does not say which files it read, so all of the device code counts as read.
    """
    from flash8.compiler.build import BuildResult

    cuda = toolchain.nvcc.parent.parent / "include"
    folders = [kernel_root(), unit.source.parent, *toolchain.include_dirs, cuda / "cccl", cuda]
    options = [*FLAGS, *unit.define_options(), *(f"-I{folder}" for folder in folders)]
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(_compile, unit, options)
        seconds = 0.0
        while True:
            try:
                text, log = job.result(timeout=0.2)
                break
            except TimeoutError:
                seconds += 0.2
                tick(seconds)
    ptx.write_bytes(text)
    roots = (kernel_root(), cutlass_root())
    read = {path.resolve() for root in roots for path in root.rglob("*") if path.is_file()}
    return BuildResult(tuple(sorted(read | {unit.source.resolve()})), log)


def _compile(unit: "Unit", options: list[str]) -> tuple[bytes, str]:
    from cuda.bindings import nvrtc

    def must(result: tuple[Any, ...]) -> Any:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"NVRTC failed for {unit.label}: {result[0].name}", "")
        return result[1] if len(result) > 1 else None

    names = [name.encode() for name in _STANDARD_HEADERS]
    texts = [
        f"#pragma once\n#include <cuda/std/{name}>\n{text}\n".encode()
        for name, text in _STANDARD_HEADERS.items()
    ]
    source = unit.source.read_bytes()
    program = must(
        nvrtc.nvrtcCreateProgram(source, str(unit.source).encode(), len(names), texts, names)
    )
    try:
        encoded = [option.encode() for option in options]
        result = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        log = b" " * must(nvrtc.nvrtcGetProgramLogSize(program))
        must(nvrtc.nvrtcGetProgramLog(program, log))
        said = log.decode().strip("\0 \n")
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            errors = [line for line in said.splitlines() if "error" in line][:10]
            raise CompileError("\n".join([f"NVRTC refused {unit.label}", *errors]), said)
        ptx = b" " * must(nvrtc.nvrtcGetPTXSize(program))
        must(nvrtc.nvrtcGetPTX(program, ptx))
        return ptx.rstrip(b"\0"), said + "\n" if said else ""
    finally:
        nvrtc.nvrtcDestroyProgram(program)
