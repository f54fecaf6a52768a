"""The GPU's clocks, power and temperature while the steps run, sampled through NVML."""

import ctypes
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

_SECONDS = 0.25  # between samples
_SM, _MEMORY, _CORE = 1, 2, 0  # of nvmlClockType_t and nvmlTemperatureSensors_t


class Clocks:
    """Samples GPU 0 until `stop`. Where NVML cannot be had, there are no samples.

    The library is libnvidia-ml.so.1, which comes with the driver, or what FLASH8_NVML names.
    """

    def __init__(self) -> None:
        self._samples: list[tuple[float, dict[str, float]]] = []
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        read = _open()
        if read is not None:
            self._thread = threading.Thread(target=self._sample, args=(read,), daemon=True)
            self._thread.start()

    def __call__(self, start: float, end: float) -> dict[str, Any] | None:
        """Minimum, median and maximum of every field between two times of `time.monotonic`."""
        found = [values for when, values in list(self._samples) if start <= when <= end]
        if not found:
            return None
        summary: dict[str, Any] = {"samples": len(found)}
        for name in found[0]:
            values = [sample[name] for sample in found if name in sample]
            summary[name] = [min(values), statistics.median(values), max(values)]
        return summary

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _sample(self, read: Callable[[], dict[str, float]]) -> None:
        while not self._stopped.wait(_SECONDS):
            values = read()
            if values:
                self._samples.append((time.monotonic(), values))


def _open() -> Callable[[], dict[str, float]] | None:
    """A function that reads what can be read, or None without NVML or a GPU."""
    try:
        library = ctypes.CDLL(os.environ.get("FLASH8_NVML") or "libnvidia-ml.so.1")
        device = ctypes.c_void_p()
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
            return None
    except (OSError, AttributeError):
        return None
    fields = {
        "sm_mhz": ("nvmlDeviceGetClockInfo", (_SM,), 1.0),
        "memory_mhz": ("nvmlDeviceGetClockInfo", (_MEMORY,), 1.0),
        "watts": ("nvmlDeviceGetPowerUsage", (), 1e-3),
        "celsius": ("nvmlDeviceGetTemperature", (_CORE,), 1.0),
    }

    def read() -> dict[str, float]:
        found = {}
        for name, (entry, arguments, unit) in fields.items():
            value = ctypes.c_uint()
            if getattr(library, entry)(device, *arguments, ctypes.byref(value)) == 0:
                found[name] = value.value * unit
        return found

    return read
