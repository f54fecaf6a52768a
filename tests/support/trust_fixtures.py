"""Fixtures of the tests of checks (`flash8.backends.hopper.verify.trust`): CPU tensors under
FLASH8_KERNELS=auto, on the simulated device."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from flash8 import _native
from flash8.backends.hopper import kernels
from flash8.ops import plan_cache
from quantizer_device import device

Checked = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def checked(monkeypatch) -> Checked:
    """A context in which kernels serve CPU tensors once they have passed their check. `image` gives
    the kernels, by variant, in the place of sound ones."""

    @contextmanager
    def serving(image: Callable[[kernels.KernelVariant], bytes] | None = None) -> Iterator[None]:
        with (
            device().serving_cpu_tensors(monkeypatch, kernels="auto"),
            monkeypatch.context() as patch,
        ):
            patch.setattr(
                plan_cache, "_plan_cache", functools.cache(lambda: plan_cache.new_plan_cache(None))
            )
            if image is not None:
                found = _native.Registry(
                    device().driver, lambda key, kind: image(kernels.variant_of(key))
                )
                patch.setattr(kernels, "registry", lambda: found)
            yield

    return serving
