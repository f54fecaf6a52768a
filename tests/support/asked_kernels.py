"""A context in which CPU tensors pass for a GPU's, and which says what kernels they ask for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flash8 import backends
from flash8.backends import cpu
from flash8.backends.hopper import decode, forward, mode
from flash8.backends.hopper.decode_variants import DecodeVariant
from flash8.backends.hopper.variants import ForwardVariant
from flash8.backends.hopper.verify import trust
from flash8.ops import plan_cache, planned


@contextmanager
def asked_kernels(monkeypatch: Any) -> Iterator[list[Any]]:
    """Yields the variants that calls inside ask for, in order; the portable code computes."""
    asked: list[Any] = []

    def record(variant: Any, device: Any) -> bool:
        asked.append(variant)
        return isinstance(variant, ForwardVariant | DecodeVariant)

    with monkeypatch.context() as patch:
        patch.setattr(backends, "kernels_wanted", lambda tensor: True)
        patch.setattr(mode, "kernels_mode", lambda: "auto")
        patch.setattr(planned, "may_launch", lambda q: False)
        patch.setattr(plan_cache, "may_launch", lambda q: False)
        patch.setattr(trust, "is_trusted", record)
        for kernel in (forward, decode):
            patch.setattr(kernel, "forward", cpu.forward)
        yield asked
