"""A GPU through the CUDA driver alone: no torch, whose import takes longer than most facts.

The library is libcuda.so.1, or the one that FLASH8_DRIVER names: the simulated device, for one.
"""

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

_MULTIPROCESSORS, _MAJOR, _MINOR, _CLOCK_KHZ, _L2_BYTES = 16, 75, 76, 13, 38


class DriverError(RuntimeError):
    """The driver refused a call."""


class Device:
    """Device 0, with its primary context current."""

    def __init__(self) -> None:
        path = os.environ.get("FLASH8_DRIVER") or "libcuda.so.1"
        try:
            self.library = ctypes.CDLL(path)
        except OSError as error:
            raise DriverError(f"no CUDA driver: {error}") from error
        self.call("cuInit", ctypes.c_uint(0))
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(0))
        self.call("cuCtxSetCurrent", context)
        self.call("cuCtxSynchronize")

    @property
    def is_simulated(self) -> bool:
        return hasattr(self.library, "flash8_sim_report")

    @property
    def name(self) -> str:
        text = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", text, ctypes.c_int(256), ctypes.c_int(0))
        return text.value.decode()

    @property
    def capability(self) -> tuple[int, int]:
        return self._attribute(_MAJOR), self._attribute(_MINOR)

    @property
    def multiprocessors(self) -> int:
        return self._attribute(_MULTIPROCESSORS)

    def describe(self) -> dict[str, Any]:
        version = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        return {
            "name": self.name,
            "capability": list(self.capability),
            "multiprocessors": self.multiprocessors,
            "clock_mhz": self._attribute(_CLOCK_KHZ) / 1000,
            "l2_bytes": self._attribute(_L2_BYTES),
            "driver": version.value,
            "simulated": self.is_simulated,
        }

    def call(self, entry: str, *arguments: Any) -> None:
        status = getattr(self.library, entry)(*arguments)
        if status == 0:
            return
        name = ctypes.c_char_p()
        self.library.cuGetErrorName(ctypes.c_int(status), ctypes.byref(name))
        said = ""
        if self.is_simulated:
            self.library.flash8_sim_last_error.restype = ctypes.c_char_p
            said = self.library.flash8_sim_last_error().decode()
        raise DriverError(f"{entry}: {(name.value or b'?').decode()} ({status}) {said}".rstrip())

    def buffer(self, array: np.ndarray) -> "Buffer":
        return Buffer(self, np.ascontiguousarray(array))

    def zeros(self, shape: int | Sequence[int], dtype: Any) -> "Buffer":
        return self.buffer(np.zeros(shape, dtype))

    def load(self, image: bytes) -> "Module":
        return Module(self, image)

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self.call(
            "cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), ctypes.c_int(0)
        )
        return value.value


class Buffer:
    """Device memory with the contents and shape of a NumPy array."""

    def __init__(self, device: Device, array: np.ndarray) -> None:
        self._device = device
        self.shape, self.dtype, self._bytes = array.shape, array.dtype, array.nbytes
        pointer = ctypes.c_uint64()
        device.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(1, array.nbytes)))
        self.pointer = pointer.value
        device.call(
            "cuMemcpyHtoD_v2",
            ctypes.c_uint64(self.pointer),
            array.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_size_t(array.nbytes),
        )

    def read(self) -> np.ndarray:
        result = np.empty(self.shape, self.dtype)
        self._device.call(
            "cuMemcpyDtoH_v2",
            result.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_uint64(self.pointer),
            ctypes.c_size_t(self._bytes),
        )
        return result


class Module:
    """The kernels of one cubin, or of one PTX text on the simulated device."""

    def __init__(self, device: Device, image: bytes) -> None:
        self._device = device
        self._handle = ctypes.c_void_p()
        device.call("cuModuleLoadData", ctypes.byref(self._handle), image + b"\0")

    def launch(self, name: str, blocks: int, threads: int, *arguments: Buffer | int) -> None:
        """Runs a kernel and waits for it; ints are 32 bits wide."""
        function = ctypes.c_void_p()
        self._device.call(
            "cuModuleGetFunction", ctypes.byref(function), self._handle, name.encode()
        )
        values = [
            ctypes.c_int(x) if isinstance(x, int) else ctypes.c_uint64(x.pointer) for x in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        sizes = [ctypes.c_uint(n) for n in (blocks, 1, 1, threads, 1, 1, 0)]
        self._device.call("cuLaunchKernel", function, *sizes, None, pointers, None)
        self._device.call("cuCtxSynchronize")
