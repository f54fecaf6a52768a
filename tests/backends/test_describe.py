"""Which kernels have served, as far as `flash8.backends.describe` knows."""

import pytest
import torch

from flash8.backends.describe import serving
from flash8.backends.hopper import kernels, mode
from flash8.backends.hopper.backward_variants import BackwardVariant
from flash8.backends.hopper.variants import ForwardVariant
from flash8.backends.hopper.verify import trust

FORWARD = ForwardVariant("bf16", 64, 64)
BACKWARD = BackwardVariant("bf16", 64, 64)


@pytest.fixture
def wanted(monkeypatch):
    """Two kernels that calls have wanted, of which one is wrong on one of two devices."""
    parts = [part for variant in (FORWARD, BACKWARD) for part in kernels.kernels_of(variant)]
    monkeypatch.setattr(kernels, "_VARIANTS", {part.name: part for part in parts})
    first, second = (torch.device("cuda", i) for i in range(2))
    findings = {(FORWARD.name, first): None, (FORWARD.name, second): "O is wrong"}
    monkeypatch.setattr(trust, "_findings", findings)


@pytest.mark.parametrize("chosen", ["auto", "require"])
def test_kernels_that_have_not_passed_have_not_served(chosen, wanted, monkeypatch):
    monkeypatch.setattr(mode, "kernels_mode", lambda: chosen)
    assert serving() == [FORWARD.name]


def test_unchecked_kernels_have_served_when_wanted(wanted, monkeypatch):
    monkeypatch.setattr(mode, "kernels_mode", lambda: "on")
    assert serving() == [FORWARD.name, BACKWARD.name]
