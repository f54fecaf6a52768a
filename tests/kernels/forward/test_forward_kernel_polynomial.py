"""Exponentials by polynomials on the simulated device: one in four, which a GPU may want, and all,
where the rounding of P still hides the difference."""

from dataclasses import dataclass, replace

import pytest
import torch

import tolerances
from defaults import by_default
from flash8.backends.hopper.variants import ForwardVariant
from flash8.compiler import Unit, compile_unit
from forward_cases import LSE_BOUND, compare, device, draw, launch, masks, reference
from forward_launch import Call, ForwardKernel, Schedule
from fp8_forward_cases import changed_sources, dense_call
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))


@dataclass(frozen=True)
class Polynomial:
    variant: ForwardVariant
    every: int
    error: float  # of one exponential, relative; LSE's is at most that

    @property
    def name(self) -> str:
        return f"{self.variant.name}, 1 in {self.every}"

    @property
    def lse_bound(self) -> dict:
        return {**LSE_BOUND, "atol": LSE_BOUND["atol"] + self.error}

    def unit(self) -> Unit:
        unit = self.variant.unit()
        defines = (*unit.defines, ("FLASH8_POLYNOMIAL_EVERY", str(self.every)))
        return replace(unit, defines=defines, name=f"polynomial {self.every}")

    def kernel(self, source=None) -> ForwardKernel:
        unit = self.unit() if source is None else replace(self.unit(), source=source)
        return ForwardKernel(device().driver, compile_unit(unit).ptx.read_bytes() + b"\0")


CAUSAL = ForwardVariant("e4m3", 128, 128, mask="causal", scales="head")
D64 = ForwardVariant("bf16", 64, 64)
FP16 = ForwardVariant("fp16", 128, 128, mask="causal")
POLYNOMIALS = [
    Polynomial(D64, 4, 7.6e-5),
    Polynomial(D64, 1, 7.6e-5),
    Polynomial(FP16, 1, 2.8e-6),
    Polynomial(CAUSAL, 4, 1.8e-3),
    Polynomial(CAUSAL, 1, 1.8e-3),
]


def call_of(variant: ForwardVariant) -> Call:
    if variant.dtype == "e4m3":
        return dense_call(variant, 1, 100, 700, 2, 1)
    q, k, v = draw(variant, 100, 700, 2, 1, batch=1)
    return Call(3.0 * q, k, v, variant.head_dim**-0.5, **masks(variant))


def check(polynomial: Polynomial, call: Call, o, lse) -> None:
    if polynomial.variant.dtype == "e4m3":
        compare(call, o, lse)
        return
    exact, exact_lse = reference(call)
    emulation, _ = reference(call, o.dtype)
    tolerances.check_fa3("O", o, exact, emulation, ulps=1.0)
    torch.testing.assert_close(lse.double(), exact_lse, **polynomial.lse_bound)


@pytest.mark.parametrize("polynomial", by_default(POLYNOMIALS, []), ids=lambda x: x.name)
def test_rounding_hides_it(polynomial):
    call = call_of(polynomial.variant)
    device().configure(seed=0)
    o, lse = polynomial.kernel()(call, Schedule())
    exact_lse = launch(polynomial.variant, call)[1]
    assert not torch.equal(lse, exact_lse)
    torch.testing.assert_close(lse, exact_lse, **polynomial.lse_bound)
    check(polynomial, call, o, lse)


@pytest.mark.parametrize("polynomial", by_default(POLYNOMIALS, []), ids=lambda x: x.name)
def test_nan_of_one_key_reaches_all_that_see_it(polynomial):
    """It is not lost where that key's exponential is a polynomial."""
    check_nan(polynomial, polynomial.kernel())


def check_nan(polynomial: Polynomial, kernel: ForwardKernel) -> None:
    call = call_of(polynomial.variant)
    device().configure(seed=0)
    for key in (4, 5, 12, 13, 20, 21, 46, 47):
        k = call.k.clone()
        k[0, key, 0, 3] = torch.nan
        o, lse = kernel(replace(call, k=k), Schedule())
        assert o.isnan().all() and lse.isnan().all()


FAULTS = {
    "a degree too low": ("exp2_of_fraction<kDegree>(", "exp2_of_fraction<2>("),
    "a floor that rounds": ("__fadd_rd(clamped, kShift)", "__fadd_rn(clamped, kShift)"),
    "no least exponent": ("ptx::max_or_nan(x, -126.0f)", "x"),
    "an exponent too many": ("kOne = 0x3f800000", "kOne = 0x40000000"),
}


@pytest.mark.parametrize("name", by_default(FAULTS, []))
def test_fault_is_found(name, tmp_path):
    """In all exponentials of fp16, with scores that fall far below the largest."""
    polynomial = POLYNOMIALS[2]
    source = changed_sources(tmp_path, ("attention/exp2.cuh", *FAULTS[name]))
    call = call_of(polynomial.variant)
    call = replace(call, q=12.0 * call.q)
    device().configure(seed=0)
    changed, whole = (polynomial.kernel(root) for root in (source / "forward" / "kernel.cu", None))
    check(polynomial, call, *whole(call, Schedule()))
    with pytest.raises(AssertionError):
        check(polynomial, call, *changed(call, Schedule()))


@pytest.mark.slow
def test_a_maximum_that_drops_nan_is_found(tmp_path):
    edit = ("attention/exp2.cuh", "ptx::max_or_nan(x, -126.0f)", "fmaxf(x, -126.0f)")
    source = changed_sources(tmp_path, edit) / "forward" / "kernel.cu"
    with pytest.raises(AssertionError):
        check_nan(POLYNOMIALS[0], POLYNOMIALS[0].kernel(source))
