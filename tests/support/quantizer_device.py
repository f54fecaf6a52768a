"""`flash8.fp8.quantize` on the simulated device, with every tensor's bounds checked."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from flash8 import _native
from flash8.backends.hopper import backward, forward
from flash8.backends.hopper.kernels import variant_of
from flash8.tensors import memory
from guarded import Guards, guard_quantizer
from simulated_device import SimulatedDevice
from trust_cases import changed_quantizers


@functools.cache
def device() -> SimulatedDevice:
    return SimulatedDevice()


def changed_kernels(folder: Path, file: str, old: str, new: str) -> _native.Registry:
    """Quantizer kernels compiled from sources with an edit."""
    image = changed_quantizers(folder, file, old, new)
    return _native.Registry(device().driver, lambda key, _kind: image(variant_of(key)))


@contextmanager
def quantizers_only(monkeypatch: Any, *, seed: int = 0) -> Iterator[None]:
    """Inside, quantizers run on kernels and attention does not."""
    with device().serving_cpu_tensors(monkeypatch, seed=seed), monkeypatch.context() as patch:
        for attention in (forward, backward):
            patch.setattr(attention, "refusal", lambda *_: "only quantizers are under test")
        yield


@contextmanager
def kernels(monkeypatch: Any, *inputs: Tensor | None, seed: int = 0) -> Iterator[None]:
    """Inside, quantizers run on kernels that may touch `inputs` and what they allocate, no more.

    What is allocated, and a cache, has guards, which must be whole after every launch.
    """
    given = [x for x in inputs if x is not None]
    guards = Guards(device())
    with quantizers_only(monkeypatch, seed=seed), monkeypatch.context() as patch:
        device().configure(seed=seed, strict_global=True)
        guard_quantizer(patch, guards)
        patch.setattr(memory, "is_readable", lambda x: False)  # as those of a GPU are not
        for x in given:
            device().register(x)
        try:
            yield
            guards.check()
        finally:
            guards.forget()
            for x in given:
                device().unregister(x)
