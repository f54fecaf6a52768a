"""A context in which CPU tensors take the Hopper backend, on the simulated device."""

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

import flash8_sim
from flash8 import _native, backends
from flash8.backends.hopper import kernels as hopper_kernels
from flash8.backends.hopper import mode
from flash8.backends.hopper.verify import trust, watchdog
from flash8.compiler import CompilerNotFoundError, compile_unit, find_toolchain
from guarded import guard_outputs


class SimulatedDevice:
    """libcuda_sim.so as a driver of the native layer, and the kernels it has loaded."""

    def __init__(self) -> None:
        library = flash8_sim.library_path()
        self.driver = _native.Driver(str(library))
        self._control = ctypes.CDLL(str(library))
        self._control.flash8_sim_last_error.restype = ctypes.c_char_p
        self._control.flash8_sim_report.restype = ctypes.c_char_p
        self._control.flash8_sim_timeline.restype = ctypes.c_char_p
        self._registry = _native.Registry(self.driver, self._image)

    def configure(self, **settings: Any) -> None:
        """The simulator's settings (`flash8_sim.DEFAULTS`), `seed` above all."""
        text = json.dumps({**flash8_sim.DEFAULTS, **settings}).encode()
        if self._control.flash8_sim_configure(text) != 0:
            raise ValueError(self._control.flash8_sim_last_error().decode())

    def report(self) -> dict[str, Any]:
        """Findings and counters of the last launch."""
        return dict(json.loads(self._control.flash8_sim_report().decode()))

    def timeline(self) -> dict[str, Any]:
        """Events of the last launch with `timeline` on; `flash8_sim.timeline` reads them."""
        return dict(json.loads(self._control.flash8_sim_timeline().decode()))

    def last_error(self) -> str:
        return str(self._control.flash8_sim_last_error().decode())

    def register(self, x: Tensor) -> None:
        """Lets kernels touch the bytes that x spans in this process's memory."""
        if x.numel():
            self._control.flash8_sim_register_memory(*_span(x))

    def unregister(self, x: Tensor) -> None:
        if x.numel():
            self._control.flash8_sim_unregister_memory(_span(x)[0])

    def ptx(self, variant: hopper_kernels.KernelVariant) -> bytes:
        return compile_unit(variant.unit()).ptx.read_bytes() + b"\0"

    def _image(self, key: str, kind: str) -> bytes:
        return self.ptx(hopper_kernels.variant_of(key))

    @contextmanager
    def serving_cpu_tensors(
        self, monkeypatch: Any, *, seed: int = 0, kernels: mode.Mode = "on"
    ) -> Iterator[None]:
        """Inside, every forward that the Hopper backend does not refuse runs on its kernel; with
        `kernels` "auto" once that has passed its check, of which nothing is known yet.

        The tensors lie in this process's memory, whose bounds are not checked here, but outputs
        have guards (`guarded.py`).
        """
        with monkeypatch.context() as patch:
            patch.setattr(backends, "kernels_wanted", lambda tensor: True)
            patch.setattr(mode, "kernels_mode", lambda: kernels)
            for kept in ("_findings", "_troubles"):
                patch.setattr(trust, kept, {})
            patch.setattr(watchdog, "hung", {})
            patch.setattr(hopper_kernels, "registry", lambda: self._registry)
            self.configure(seed=seed, strict_global=False)
            with guard_outputs(patch, self):
                yield
        self.configure()


def _span(x: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return ctypes.c_void_p(x.data_ptr()), ctypes.c_size_t((last + 1) * x.element_size())


def missing_compiler() -> str | None:
    """Why kernels cannot be compiled on this machine, or None."""
    try:
        find_toolchain()
    except CompilerNotFoundError as error:
        return str(error)
    return None
