"""A CUDA driver that runs the PTX of sm_90a kernels on the CPU, and what it found."""

from .nvcc import CompilerNotFoundError, compile_library, compile_ptx, load_library
from .ptx import HEADER, kernel, line_of
from .simulator import DEFAULTS, Buffer, Module, Simulator, SimulatorError, TensorMap, library_path

__all__ = [
    "DEFAULTS",
    "HEADER",
    "Buffer",
    "CompilerNotFoundError",
    "Module",
    "Simulator",
    "SimulatorError",
    "TensorMap",
    "compile_library",
    "compile_ptx",
    "kernel",
    "library_path",
    "line_of",
    "load_library",
]
