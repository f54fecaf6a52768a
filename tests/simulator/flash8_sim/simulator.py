"""The simulated driver from Python: load PTX, launch, read reports. ctypes only."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


def library_path() -> Path:
    """libcuda_sim.so, for programs that open a CUDA driver themselves.

    Raises:
        FileNotFoundError: this package is a folder of sources, which was not installed.
    """
    path = Path(__file__).resolve().parent / "libcuda_sim.so"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: Python found the sources of flash8_sim before the installed "
            f"package; pip install {path.parents[1]}, and start Python in another folder"
        )
    return path


class SimulatorError(RuntimeError):
    """A driver entry failed. The text is the simulator's own; attributes have what it names.

    Of a finding with two sides (a race), they are the side whose access came last; of a deadlock,
    the first warp that waits. What the text does not name is None.
    """

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name  # CUDA_ERROR_...
        self.kind = _first(r"\[([\w-]+)\]", message)  # "race", "deadlock", "out-of-bounds", ...
        self.kernel = _first(r"\] kernel ([^\s,:]+)", message)
        self.cta = _numbers(r"CTA \((\d+), (\d+), (\d+)\)", message)
        self.warp = _number(r"\bwarp (\d+)", message)
        self.line = _number(r"\bPTX line (\d+)", message)
        masks = r"(?<!lanes )(?<!only )(?<!mask )"
        self.address = _number(masks + r"\b(0x[0-9a-f]+)", message)


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


def _number(pattern: str, text: str) -> int | None:
    found = _first(pattern, text)
    return None if found is None else int(found, 0)


def _numbers(pattern: str, text: str) -> tuple[int, ...] | None:
    found = re.search(pattern, text)
    return tuple(map(int, found.groups())) if found else None


class ClusterDimension(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]


class AttributeValue(ctypes.Union):
    _fields_ = [
        ("bytes", ctypes.c_char * 64),
        ("cluster", ClusterDimension),
        ("flag", ctypes.c_int),
    ]


class LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", AttributeValue)]


class LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
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
    """libcuda_sim.so, initialized, with a context. There is one device in a process.

    `settings` as `configure` takes them; `DEFAULTS` has them all.
    """

    def __init__(self, **settings: Any) -> None:
        self.library = ctypes.CDLL(str(library_path()))
        for entry in ("report", "timeline", "totals", "last_error"):
            getattr(self.library, f"flash8_sim_{entry}").restype = ctypes.c_char_p
        self.call("cuInit", ctypes.c_uint(0))
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(0))
        self.call("cuCtxPushCurrent_v2", context)
        if settings:
            self.configure(**settings)

    def call(self, entry: str, *arguments: Any) -> None:
        """A driver entry, or one of the simulator's own. Raises SimulatorError where it fails."""
        result = getattr(self.library, entry)(*arguments)
        if result != 0:
            name = ctypes.c_char_p()
            self.library.cuGetErrorName(ctypes.c_int(result), ctypes.byref(name))
            raise SimulatorError((name.value or b"?").decode(), f"{entry}: {self.last_error()}")

    def configure(self, **settings: Any) -> None:
        """Settings for all launches from here on; those that are not named stay as they are."""
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
        """Of the last launch: `ok`, `error`, and under `statistics` what was counted."""
        return dict(json.loads(self.library.flash8_sim_report().decode()))

    def timeline(self) -> dict[str, Any]:
        """Of the last launch with `timeline` on, in the format of Chrome's trace viewer."""
        return dict(json.loads(self.library.flash8_sim_timeline().decode()))

    def last_error(self) -> str:
        """The words for the last driver entry that failed in this thread."""
        return str(self.library.flash8_sim_last_error().decode())

    def load(self, ptx: str) -> Module:
        """Raises SimulatorError, with the PTX line, for what the simulator does not model."""
        return Module(self, ptx)

    def buffer(self, array: np.ndarray) -> Buffer:
        """Device memory with the array's values."""
        return Buffer(self, array)

    def zeros(self, shape: int | Sequence[int], dtype: Any) -> Buffer:
        return Buffer(self, np.zeros(shape, dtype))

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Buffer:
        """Memory that nobody has written: to read it before a kernel has is a finding."""
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
    "watch": "",
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
        attributes = (LaunchAttribute * 2)(LaunchAttribute(id=6), LaunchAttribute(id=4))
        attributes[0].value.flag = int(overlap)
        attributes[1].value.cluster = ClusterDimension(*_dim3(1 if cluster is None else cluster))
        config = LaunchConfig(
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
