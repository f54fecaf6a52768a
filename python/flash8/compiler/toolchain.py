"""Finds nvcc, ptxas and the headers they need: the ones that pip installed, or the system's."""

import importlib.util
import os
import shutil
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flash8.compiler.errors import CompilerNotFoundError
from flash8.compiler.places import printable
from flash8.compiler.process import TimeLimitError, run

INSTALL_HINT = (
    "install it with `pip install --no-deps nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 "
    "nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 "
    "nvidia-cutlass==4.2.0.0`, or put a CUDA 12.4 or newer nvcc on PATH"
)
DEFAULT_CUDA = Path("/usr/local/cuda")
_VERSION_LIMIT = 60.0  # seconds
#: What changes what nvcc does without a trace in its version or in the files that are read.
_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


@dataclass(frozen=True)
class Toolchain:
    """A CUDA compiler. `include_dirs` are searched after the kernels' own headers.

    With `nvrtc` the front end is NVRTC: nvcc would need a host compiler, and there is none.
    """

    nvcc: Path
    ptxas: Path
    include_dirs: tuple[Path, ...]
    version: str
    origin: str
    nvrtc: bool = False

    def identity(self) -> list[str]:
        """What decides what it makes of a source, besides the source and the headers."""
        tools = (self.nvcc, self.ptxas, self.nvcc.parent.parent / "nvvm" / "bin" / "cicc")
        sizes = [str(tool.stat().st_size) if tool.is_file() else "" for tool in tools]
        settings = [os.environ.get(name, "") for name in _VARIABLES]
        return [self.version, *sizes, *settings, str(len(self.include_dirs))]


def kernel_root() -> Path:
    """The folder of the device code: hopper/ of the checkout, or its copy in the wheel."""
    package = Path(__file__).resolve().parent.parent
    for root in (package / "hopper", package.parent.parent / "hopper"):
        if (root / "params.h").is_file():
            return root.resolve()
    raise CompilerNotFoundError(f"the device code is missing from {package}; install flash8 again")


def cutlass_root() -> Path:
    """The folder of the device code around attention, cutlass_kernels/: beside hopper/."""
    return kernel_root().parent / "cutlass_kernels"


def find_toolchain() -> Toolchain:
    """The compiler to use: FLASH8_NVCC, else pip's, CUDA_HOME's, PATH's, or /usr/local/cuda's.

    Raises CompilerNotFoundError, which says how to install one.
    """
    named = os.environ.get("FLASH8_NVCC")
    if named:
        return _at(Path(named).absolute(), "FLASH8_NVCC")
    site = Path(sysconfig.get_path("purelib"))
    candidates = [(site / "nvidia" / "cu13" / "bin" / "nvcc", "pip")]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        candidates.append((Path(home).absolute() / "bin" / "nvcc", "CUDA_HOME"))
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append((Path(on_path).resolve(), "PATH"))
    candidates.append((DEFAULT_CUDA / "bin" / "nvcc", str(DEFAULT_CUDA)))
    for nvcc, origin in candidates:
        # A wrapper script called nvcc may lie on PATH by itself; its installation is further down.
        if nvcc.is_file() and nvcc.with_name("ptxas").is_file():
            return _at(nvcc, origin)
    raise CompilerNotFoundError(f"no CUDA compiler was found; {INSTALL_HINT}")


def _at(nvcc: Path, origin: str) -> Toolchain:
    ptxas = nvcc.with_name("ptxas")
    for tool in (nvcc, ptxas):
        if not os.access(tool, os.X_OK):
            raise CompilerNotFoundError(
                f"{printable(tool)} (from {origin}) is not an executable file"
            )
    nvrtc = not has_host_compiler() and has_nvrtc()
    version = ("NVRTC beside " if nvrtc else "") + _version(nvcc)
    return Toolchain(nvcc, ptxas, _include_dirs(), version, origin, nvrtc)


def has_host_compiler() -> bool:
    """Whether nvcc will find one: NVCC_CCBIN, or g++ on PATH."""
    return bool(os.environ.get("NVCC_CCBIN")) or shutil.which("g++") is not None


def has_nvrtc() -> bool:
    """Whether cuda-python's bindings can be imported."""
    try:
        return importlib.util.find_spec("cuda.bindings.nvrtc") is not None
    except ImportError:
        return False


def _include_dirs() -> tuple[Path, ...]:
    """CUTLASS. The CUDA headers themselves, the C++ core libraries among them, nvcc knows."""
    named = os.environ.get("FLASH8_CUTLASS")
    site = Path(sysconfig.get_path("purelib"))
    path = Path(named).absolute() if named else site / "cutlass_library" / "source" / "include"
    return (path,) if path.is_dir() else ()


@cache
def _version(nvcc: Path) -> str:
    """The release and build that nvcc names, such as "V13.0.88 cuda_13.0.r13.0/compiler..."."""
    try:
        status, said = run([nvcc, "--version"], limit=_VERSION_LIMIT)
    except (TimeLimitError, OSError) as error:
        raise CompilerNotFoundError(f"{printable(nvcc)} --version failed: {error}") from error
    if status != 0:
        raise CompilerNotFoundError(f"{printable(nvcc)} --version failed: {said.strip()}")
    return " ".join(said.splitlines()[-2:])
