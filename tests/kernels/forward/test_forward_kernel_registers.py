"""The registers that a forward kernel's warpgroups hand to one another, on the simulated device."""

import re

import pytest

from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import device, draw
from forward_launch import Call, ForwardKernel, Schedule
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

FP8 = ForwardVariant("e4m3", 128, 128, mask="causal", scales="head")


def run(ptx: bytes) -> None:
    q, k, v = draw(FP8, 64, 64, 1, 1, batch=1)
    device().configure(seed=0)
    ForwardKernel(device().driver, ptx)(Call(q, k, v, 0.1, causal=True), Schedule(num_ctas=1))


def test_eight_registers_too_many_are_a_hang():
    """48 + 2 x 232 of 3 x 168: the second consumer warpgroup waits for what nobody releases."""
    ptx = device().ptx(FP8)
    run(ptx)
    (released,) = re.findall(rb"setmaxnreg\.dec\.sync\.aligned\.u32 +(\d+);", ptx)
    ask = b"setmaxnreg.dec.sync.aligned.u32 %d;"
    old = re.sub(rb"setmaxnreg\.dec\.sync\.aligned\.u32 +\d+;", ask % (int(released) + 8), ptx)
    waits = next(i for i, line in enumerate(old.split(b"\n"), 1) if b"setmaxnreg.inc" in line)
    with pytest.raises(RuntimeError) as raised:
        run(old)
    message = f"{raised.value} {device().last_error()}"
    assert "[deadlock] kernel flash8_forward" in message
    assert f"PTX line {waits} (setmaxnreg.inc" in message
    assert "waits for setmaxnreg.inc to 232 registers" in message
