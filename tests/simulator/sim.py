"""The simulated driver from Python: build it, load PTX, launch, read reports. ctypes only."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = Path(__file__).resolve().parent
HEADER = ".version 8.6\n.target sm_90a\n.address_size 64\n"


def build_directory() -> Path:
    """Where the library is built: FLASH8_SIM_BUILD, or a folder of the user's cache.

    CMake refuses a build folder that another checkout configured, so the folder in the cache is
    named by this checkout's path.
    """
    chosen = os.environ.get("FLASH8_SIM_BUILD")
    if chosen:
        return Path(chosen)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    checkout = hashlib.sha256(str(SOURCE).encode()).hexdigest()[:12]
    return cache / "flash8" / f"simulator-{checkout}"


def build() -> Path:
    """Configures and builds libcuda_sim.so (a no-op when nothing changed) and returns its path.

    Raises RuntimeError with the tool's output when cmake or the compiler fails.
    """
    cmake = shutil.which("cmake")
    if cmake is None:
        raise RuntimeError("cmake is not installed: the simulator needs cmake and a C++17 compiler")
    directory = build_directory()
    directory.mkdir(parents=True, exist_ok=True)
    jobs = str(min(2, os.cpu_count() or 1))
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's workers would otherwise build at the same time
        for command in (
            [cmake, "-S", str(SOURCE), "-B", str(directory)],
            [cmake, "--build", str(directory), "-j", jobs],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return directory / "libcuda_sim.so"


class SimulatorError(RuntimeError):
    """A driver entry failed; the text is the simulator's own."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


class _Cluster(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]


class _Value(ctypes.Union):
    _fields_ = [("bytes", ctypes.c_char * 64), ("cluster", _Cluster), ("flag", ctypes.c_int)]


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", _Value)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


class Buffer:
    """Device memory with the contents and shape of a NumPy array."""

    def __init__(self, sim: Simulator, array: np.ndarray, *, written: bool = True) -> None:
        self._sim = sim
        self.shape, self.dtype, self.bytes = array.shape, array.dtype, array.nbytes
        pointer = ctypes.c_uint64()
        sim.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(self.bytes, 1)))
        self.pointer = pointer.value
        if written:
            self.write(array)

    def write(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array)
        self._sim.call(
            "cuMemcpyHtoD_v2",
            ctypes.c_uint64(self.pointer),
            data.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(data.nbytes),
        )

    def read(self) -> np.ndarray:
        result = np.empty(self.shape, self.dtype)
        self._sim.call(
            "cuMemcpyDtoH_v2",
            result.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_uint64(self.pointer),
            ctypes.c_size_t(self.bytes),
        )
        return result

    def free(self) -> None:
        self._sim.call("cuMemFree_v2", ctypes.c_uint64(self.pointer))


class TensorMap:
    """The 128 bytes of a tensor map, to be passed as a kernel parameter."""

    def __init__(self) -> None:
        self._room = ctypes.create_string_buffer(128 + 64)
        start = ctypes.addressof(self._room)
        self.address = (start + 63) // 64 * 64

    def raw(self) -> bytes:
        return ctypes.string_at(self.address, 128)


TMA_TYPES = {
    "u8": 0,
    "u16": 1,
    "u32": 2,
    "s32": 3,
    "u64": 4,
    "s64": 5,
    "f16": 6,
    "f32": 7,
    "f64": 8,
    "bf16": 9,
}
SWIZZLES = {"none": 0, "32": 1, "64": 2, "128": 3}


class Simulator:
    """libcuda_sim.so, initialized, with a context."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for entry in ("report", "timeline", "totals", "last_error"):
            getattr(self.library, f"flash8_sim_{entry}").restype = ctypes.c_char_p
        self.call("cuInit", ctypes.c_uint(0))
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(0))
        self.call("cuCtxPushCurrent_v2", context)

    def call(self, entry: str, *arguments: Any) -> None:
        result = getattr(self.library, entry)(*arguments)
        if result != 0:
            name = ctypes.c_char_p()
            self.library.cuGetErrorName(ctypes.c_int(result), ctypes.byref(name))
            message = self.library.flash8_sim_last_error().decode()
            raise SimulatorError((name.value or b"?").decode(), f"{entry}: {message}")

    def configure(self, **settings: Any) -> None:
        self.call("flash8_sim_configure", json.dumps(settings).encode())

    @contextmanager
    def configured(self, **settings: Any) -> Iterator[None]:
        """Settings for the launches inside; the defaults come back afterwards."""
        self.configure(**settings)
        try:
            yield
        finally:
            self.configure(**DEFAULTS)

    def report(self) -> dict[str, Any]:
        return dict(json.loads(self.library.flash8_sim_report().decode()))

    def timeline(self) -> dict[str, Any]:
        return dict(json.loads(self.library.flash8_sim_timeline().decode()))

    def load(self, ptx: str) -> Module:
        return Module(self, ptx)

    def buffer(self, array: np.ndarray) -> Buffer:
        return Buffer(self, array)

    def zeros(self, shape: int | Sequence[int], dtype: Any) -> Buffer:
        return Buffer(self, np.zeros(shape, dtype))

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Buffer:
        """Memory that nobody has written."""
        return Buffer(self, np.empty(shape, dtype), written=False)

    def tensor_map(
        self,
        buffer: Buffer,
        *,
        dtype: str,
        shape: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        swizzle: str = "none",
        element_strides: Sequence[int] | None = None,
        nan_fill: bool = False,
        offset: int = 0,
    ) -> TensorMap:
        """`shape`, `box`: innermost first; `strides`: bytes, of dimension 1 and up."""
        tensor_map = TensorMap()
        rank = len(shape)
        u64, u32 = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
        outer = [*strides, 0]
        self.call(
            "cuTensorMapEncodeTiled",
            ctypes.c_void_p(tensor_map.address),
            ctypes.c_int(TMA_TYPES[dtype]),
            ctypes.c_uint32(rank),
            ctypes.c_void_p(buffer.pointer + offset),
            u64(*shape),
            u64(*outer[:rank]),
            u32(*box),
            u32(*(element_strides or [1] * rank)),
            ctypes.c_int(0),
            ctypes.c_int(SWIZZLES[swizzle]),
            ctypes.c_int(0),
            ctypes.c_int(int(nan_fill)),
        )
        return tensor_map


DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "async": "seed",
    "quantum": 0,
    "threads": 1,
    "multiprocessors": 132,
    "stall_limit": 20_000_000,
    "checks": True,
    "cp_async_fence": True,
    "exact_16bit": True,
    "exact_8bit": True,
    "strict_global": True,
    "timeline": False,
}


class Module:
    """A loaded PTX text."""

    def __init__(self, sim: Simulator, ptx: str) -> None:
        self._sim = sim
        self.handle = ctypes.c_void_p()
        sim.call("cuModuleLoadData", ctypes.byref(self.handle), ptx.encode())

    def launch(
        self,
        name: str,
        *arguments: Any,
        grid: int | Sequence[int] = 1,
        block: int | Sequence[int] = 32,
        shared: int = 0,
        cluster: int | Sequence[int] | None = None,
        overlap: bool = False,
    ) -> None:
        """Arguments: Buffer, TensorMap, bytes, or a NumPy or ctypes scalar; an int is 32 bits.

        Without `cluster` the launch has no such attribute. `overlap`: the grid may begin before the
        one before it has ended (programmatic stream serialization).
        """
        function = ctypes.c_void_p()
        self._sim.call("cuModuleGetFunction", ctypes.byref(function), self.handle, name.encode())
        if shared:
            self._sim.call("cuFuncSetAttribute", function, ctypes.c_int(8), ctypes.c_int(shared))
        values = [_as_parameter(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*[ctypes.addressof(v) for v in values])
        attributes = (_Attribute * 2)(_Attribute(id=6), _Attribute(id=4))
        attributes[0].value.flag = int(overlap)
        attributes[1].value.cluster = _Cluster(*_dim3(1 if cluster is None else cluster))
        config = _Config(
            (ctypes.c_uint * 3)(*_dim3(grid)),
            (ctypes.c_uint * 3)(*_dim3(block)),
            shared,
            None,
            attributes,
            1 if cluster is None else 2,
        )
        self._sim.call("cuLaunchKernelEx", ctypes.byref(config), function, pointers, None)

    def unload(self) -> None:
        self._sim.call("cuModuleUnload", self.handle)


def _dim3(value: int | Sequence[int]) -> tuple[int, int, int]:
    given = [value] if isinstance(value, int) else list(value)
    x, y, z = given + [1] * (3 - len(given))
    return x, y, z


def _as_parameter(argument: Any) -> Any:
    if isinstance(argument, Buffer):
        return ctypes.c_uint64(argument.pointer)
    if isinstance(argument, TensorMap):
        return ctypes.create_string_buffer(argument.raw(), 128)
    if isinstance(argument, bytes):
        return ctypes.create_string_buffer(argument, len(argument))
    if isinstance(argument, int):
        return ctypes.c_int(argument)
    if isinstance(argument, np.generic):
        return ctypes.create_string_buffer(argument.tobytes(), argument.nbytes)
    return argument


def kernel(
    body: str, *, parameters: str = "", name: str = "k", directives: str = "", module: str = ""
) -> str:
    """PTX text of one kernel around `body`; `parameters` like ".param .u64 out, .param .u32 n"."""
    listed = ",\n  ".join(part.strip() for part in parameters.split(",") if part.strip())
    return (
        f"{HEADER}{module}\n.visible .entry {name}(\n  {listed}\n)\n{directives}\n{{\n{body}\n}}\n"
    )


def line_of(ptx: str, text: str, occurrence: int = 0) -> int:
    """The PTX line that contains `text`, counted from 1: what a finding should name."""
    lines = [i + 1 for i, line in enumerate(ptx.splitlines()) if re.search(re.escape(text), line)]
    return lines[occurrence]
