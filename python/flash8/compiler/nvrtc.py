"""The front end without a host compiler: NVRTC, through cuda-python's bindings.

nvcc asks a host compiler to preprocess even device code; NVRTC does not, but has no C++ standard
library. The few standard headers that the device code includes are given to it here, over libcu++.
It runs in a process of its own (`nvrtc_process.py`), which can be ended when it hangs.
"""

import importlib.metadata
import json
import os
import sys
from pathlib import Path

from flash8.compiler.errors import CompilerNotFoundError
from flash8.compiler.reads import device_code
from flash8.compiler.toolchain import Toolchain, kernel_root
from flash8.compiler.unit import Unit

FLAGS = (
    "-arch=compute_90a",
    "-std=c++17",
    "-default-device",
    "--use_fast_math",
    "-DNDEBUG",
    "-DINFINITY=__int_as_float(0x7f800000)",
    "-DNAN=__int_as_float(0x7fffffff)",
)
_INTEGERS = " ".join(f"using ::{s}int{n}_t;" for n in (8, 16, 32, 64) for s in ("", "u"))
_STANDARD_HEADERS = {
    "cstdint": f"namespace std {{ {_INTEGERS} using ::uintptr_t; }}",
    "cstddef": "namespace std { using ::size_t; using ::ptrdiff_t; }",
    "cfloat": "#define FLT_MIN 0x1p-126f\n#define FLT_MAX 0x1.fffffep127f",
    "cmath": "",
    "utility": "namespace std { using namespace cuda::std; }",
    "type_traits": "namespace std { using namespace cuda::std; }",
}
_PROCESS = Path(__file__).resolve().with_name("nvrtc_process.py")


def identity() -> list[str]:
    """What decides what NVRTC makes of a source, besides the source."""
    versions = []
    for name in ("cuda-bindings", "nvidia-cuda-nvrtc"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} of unknown version")
    return [*versions, *FLAGS, json.dumps(_STANDARD_HEADERS)]


def front_end(unit: Unit, toolchain: Toolchain) -> tuple[list[str | Path], bytes, tuple[Path, ...]]:
    """The command that writes kernel.ptx into its working folder, its input, and what it reads.

    NVRTC does not say which files it read, so all of the device code counts as read.
    """
    if not sys.executable:
        raise CompilerNotFoundError(
            "NVRTC runs in a process of Python, and sys.executable is empty"
        )
    cuda = toolchain.nvcc.parent.parent / "include"
    source = unit.source.absolute()
    folders = [kernel_root(), source.parent, *toolchain.include_dirs, cuda / "cccl", cuda]
    headers = {
        name: f"#pragma once\n#include <cuda/std/{name}>\n{text}\n"
        for name, text in _STANDARD_HEADERS.items()
    }
    request = {
        "path": [path or os.getcwd() for path in sys.path],
        "source": str(source),
        "options": [*FLAGS, *unit.define_options(), *(f"-I{folder}" for folder in folders)],
        "headers": headers,
    }
    read = {*device_code(), source.resolve()}
    command: list[str | Path] = [sys.executable, "-I", _PROCESS]
    return command, json.dumps(request).encode(), tuple(sorted(read))
