"""`flash8.fp8.quantize` on the simulated device, with every tensor's bounds checked."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flash8.backends import hopper
from flash8.fp8 import quantizer
from simulated_device import SimulatedDevice

_POISON = 0xA5
_GUARD_BYTES = 256


@functools.cache
def device() -> SimulatedDevice:
    return SimulatedDevice()


@contextmanager
def quantizers_only(monkeypatch: Any, *, seed: int = 0) -> Iterator[None]:
    """Inside, quantizers run on kernels and attention does not."""
    with device().serving_cpu_tensors(monkeypatch, seed=seed), monkeypatch.context() as patch:
        patch.setattr(hopper, "refusal", lambda *_: "only quantizers are under test")
        yield


@contextmanager
def kernels(
    monkeypatch: Any, *inputs: Tensor | None, seed: int = 0, races: bool = True
) -> Iterator[None]:
    """Inside, quantizers run on kernels that may touch `inputs` and what they allocate, no more.

    What is allocated is poisoned and has guards around it, which must be whole in the end.
    Without `races` two CTAs may write one place.
    """
    guarded: list[Tensor] = []
    given = [x for x in inputs if x is not None]

    def allocate(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.full((size + 2 * _GUARD_BYTES,), _POISON, dtype=torch.uint8)
        guarded.append(raw)
        inner = raw[_GUARD_BYTES : _GUARD_BYTES + size]
        device().register(inner)
        return inner.view(dtype).view(shape)

    with quantizers_only(monkeypatch, seed=seed), monkeypatch.context() as patch:
        device().configure(seed=seed, strict_global=True, check_races=races)
        patch.setattr(quantizer, "allocate", allocate)
        for x in given:
            device().register(x)
        try:
            yield
        finally:
            for x in given:
                device().unregister(x)
            for raw in guarded:
                device().unregister(raw[_GUARD_BYTES:-_GUARD_BYTES])
    for raw in guarded:
        edges = torch.cat((raw[:_GUARD_BYTES], raw[-_GUARD_BYTES:]))
        assert (edges == _POISON).all(), "a kernel wrote outside of its output"
