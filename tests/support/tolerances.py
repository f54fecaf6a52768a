"""How close is close enough, and why.

Every `check_*` raises AssertionError with the numbers in its message; test_mutations.py shows that
each of them fails on a wrong result.  Error measures work in float64.

relL2 bounds marked "emulated" come from a bit-level CPU emulation of Hopper's FP8 tensor cores on
the inputs each test rebuilds; the value next to the bound is what that emulation gave.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------ measures


def rel_l2(actual: Tensor, reference: Tensor) -> float:
    """|actual - reference| / |reference|, 2-norms over everything."""
    a, r = actual.double(), reference.double()
    return ((a - r).norm() / r.norm().clamp_min(1e-300)).item()


def rel_l2_beyond_rounding(actual: Tensor, reference: Tensor) -> float:
    """relL2 without what rounding to `actual`'s 16-bit type explains: half a unit of its last place
    in every element."""
    bits = 8 if actual.dtype == torch.bfloat16 else 11
    a, r = actual.double(), reference.double()
    half_unit = torch.ldexp((a != 0.0).to(a.dtype), torch.frexp(a).exponent - bits - 1)
    beyond = ((a - r).abs() - half_unit).clamp_min(0.0)
    return (beyond.norm() / r.norm().clamp_min(1e-300)).item()


def row_rel_l2(actual: Tensor, reference: Tensor) -> float:
    """The largest relL2 of a single row (last dimension)."""
    a, r = actual.double(), reference.double()
    return ((a - r).norm(dim=-1) / r.norm(dim=-1).clamp_min(1e-300)).max().item()


def cosine(actual: Tensor, reference: Tensor) -> float:
    a, r = actual.double().flatten(), reference.double().flatten()
    return (a @ r / (a.norm() * r.norm()).clamp_min(1e-300)).item()


def max_abs(actual: Tensor, reference: Tensor) -> float:
    """Largest difference; equal infinities differ by nothing, a NaN by infinity."""
    a, r = actual.double(), reference.double()
    difference = torch.where(a == r, torch.zeros_like(a), (a - r).abs())
    return torch.nan_to_num(difference, nan=float("inf")).max().item() if a.numel() else 0.0


def mean_abs(actual: Tensor, reference: Tensor) -> float:
    return (actual.double() - reference.double()).abs().mean().item()


def max_abs_over_rms(actual: Tensor, reference: Tensor) -> float:
    return max_abs(actual, reference) / reference.double().square().mean().sqrt().item()


# ----------------------------------------------------------------------- 16 and 32 bits, and 64

# FA3's own tests: at most twice the error of a PyTorch computation in the same precision.
FA3_FACTOR = 2.0
# And, over many elements, at most 1.5 times its mean error (FA3's KV-cache test).
FA3_MEAN_FACTOR = 1.5
MANY = 4096
# FA3 allows 3 with softcap: tanh's derivative magnifies rounding differences of S.
FA3_FACTOR_SOFTCAP = 3.0


def rounding_floor(reference: Tensor, dtype: torch.dtype) -> float:
    """FA3's floor: what adding and subtracting 0.3 in `dtype` does to the reference, twice."""
    r = reference.to(dtype)
    finite = torch.where(torch.isfinite(r), r, torch.zeros_like(r))
    return 2.0 * ((finite + 0.3 - 0.3) - finite).abs().max().item() if r.numel() else 0.0


def one_ulp(reference: Tensor, dtype: torch.dtype) -> float:
    """Spacing of `dtype` at the largest reference value, for tensors too small for statistics."""
    finite = reference.double()[torch.isfinite(reference)]
    return torch.finfo(dtype).eps * finite.abs().max().item() if finite.numel() else 0.0


def check_fa3(
    name: str,
    actual: Tensor,
    reference: Tensor,
    emulation: Tensor,
    *,
    factor: float = FA3_FACTOR,
    ulps: float = 0.0,
    dtype: torch.dtype | None = None,
) -> None:
    """max|actual - reference| <= factor * max|emulation - reference| + rounding floor.

    `ulps` (of the largest value) is for small random problems, where the emulation may be exact by
    luck; 0 is FA3's rule to the letter.  `dtype` is the precision of the computation where the
    result comes in a wider type (the gradient of an fp32 sink).
    """
    dtype = dtype or actual.dtype
    bound = factor * max_abs(emulation, reference) + rounding_floor(reference, dtype)
    bound += ulps * one_ulp(reference, dtype)
    error = max_abs(actual, reference)
    assert error <= bound, f"{name}: max error {error:.3e} above {bound:.3e} (FA3's rule)"
    if reference.count_nonzero() >= MANY:
        bound = FA3_MEAN_FACTOR * mean_abs(emulation, reference)
        error = mean_abs(actual, reference)
        assert error <= bound, f"{name}: mean error {error:.3e} above {bound:.3e} (FA3's rule)"


# Distance from the float64 oracle, relative to the largest reference value (at least 1).
# fp64: a few hundred roundings of 1.1e-16.  fp32: the same in 6e-8, exp and log included.
ABSOLUTE = {torch.float64: 1e-11, torch.float32: 2e-5}
# LSE is accumulated in fp32 (6e-8) over S whose inputs are exact; |S| up to about 40 in our tests.
LSE_ABSOLUTE = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 5e-5,
    torch.bfloat16: 5e-5,
}


def check_absolute(name: str, actual: Tensor, reference: Tensor, atol: float) -> None:
    finite = reference.double()[torch.isfinite(reference)]
    bound = atol * max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
    error = max_abs(actual, reference)
    assert error <= bound, f"{name}: max error {error:.3e} above {bound:.3e}"


def check_close(
    name: str,
    actual: Tensor,
    reference: Tensor,
    emulation: Tensor | None,
    factor: float,
    ulps: float = 1.0,
    dtype: torch.dtype | None = None,
) -> None:
    """The rule that fits the precision of the computation: FA3's for 16 bits, absolute above."""
    dtype = dtype or actual.dtype
    if dtype in ABSOLUTE:
        check_absolute(name, actual, reference, ABSOLUTE[dtype])
    else:
        assert emulation is not None
        check_fa3(name, actual, reference, emulation, factor=factor, ulps=ulps, dtype=dtype)


def check_lse(name: str, actual: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    check_absolute(name, actual, reference, LSE_ABSOLUTE[dtype])


# ------------------------------------------------------------------------------------- e4m3


@dataclass(frozen=True)
class Bound:
    limit: float
    measured: float
    source: str

    def check(self, name: str, value: float) -> None:
        assert value <= self.limit, f"{name}: {value:.3e} above {self.limit:.1e} ({self.source})"


# Against float64 attention on the dequantised inputs; N(0, 1) q, k and zero-mean v.
FP8_REL_L2 = Bound(0.035, 0.029, "emulated, relL2 of O against the dequantised inputs")
FP8_ROW_REL_L2 = Bound(0.055, 0.040, "emulated, worst row of O against the dequantised inputs")
FP8_MAX_OVER_RMS = Bound(0.25, 0.18, "emulated, max |error| over rms(O)")
FP8_MODEL = Bound(0.012, 0.0089, "emulated, relL2 against a block-exact emulator")
# v ~ N(.5, 1), std-1 logits, N >= 16K; an accumulator that is never promoted gives .11 and more.
FP8_ACCUMULATION = Bound(0.005, 0.0009, "emulated, relL2 with V of mean 0.5")
# One key whose logit stands 13 above the rest, at the start, middle and end of the sequence.
FP8_SINK_KEY = Bound(0.02, 0.011, "emulated, relL2 with one key 13 above the rest")
FP8_LSE = Bound(1e-3, 2.6e-4, "emulated, |LSE error|, logit std <= 2")
FP8_LSE_OUTLIER = Bound(5e-3, 1.4e-3, "emulated, |LSE error|, K with outlier channels")
# Against attention on what was quantised: std-1 logits, descale = amax / 448.
FP8_UNQUANTISED = Bound(0.065, 0.054, "emulated, relL2 against the unquantised inputs")

# Gradients of FP8 attention, (dQ, dK, dV). 16-bit backward: against the gradients of the
# dequantised inputs, and of the inputs themselves (std-1 logits); then FP8 backwards.
FP8_GRADIENTS_DEQUANTISED = (
    Bound(0.012, 0.003, "emulated, relL2 of dQ against the dequantised inputs"),
    Bound(0.012, 0.003, "emulated, relL2 of dK against the dequantised inputs"),
    Bound(0.004, 0.0016, "emulated, relL2 of dV against the dequantised inputs"),
)
FP8_GRADIENTS_TRUE = (
    Bound(0.07, 0.055, "emulated, relL2 of dQ"),
    Bound(0.07, 0.055, "emulated, relL2 of dK"),
    Bound(0.045, 0.036, "emulated, relL2 of dV"),
)
FP8_GRADIENTS_FULL = (
    Bound(0.08, 0.062, "emulated, relL2 of dQ of an FP8 backward"),
    Bound(0.08, 0.062, "emulated, relL2 of dK of an FP8 backward"),
    Bound(0.065, 0.050, "emulated, relL2 of dV of an FP8 backward"),
)
FP8_GRADIENT_COSINE = {"fp8_scores": 0.997, "fp8": 0.996}
# Decode, beyond the rounding of O: the largest of test_decode_kernel.py behind. P of fp16 keeps
# eleven bits, that of bf16 eight. The simulated device's tanh is exact.
DECODE_FP16 = Bound(2e-4, 4.7e-5, "simulated, relL2 of O, fp16 arithmetic")
DECODE_BF16 = Bound(1e-3, 2.7e-4, "simulated, relL2 of O, bf16 arithmetic")
DECODE_LSE = Bound(1e-5, 4.5e-6, "simulated, |LSE error|")
# e4m3 K and V under a 16-bit Q: against the dequantised cache, and in all.
FP8_CACHE_DEQUANTISED = Bound(0.004, 0.0016, "emulated, relL2 against the dequantised cache")
FP8_CACHE_TOTAL = Bound(0.05, 0.039, "emulated, relL2 against the unquantised cache")


def check_fp8(name: str, out: Tensor, reference: Tensor) -> None:
    """The three bounds for an e4m3 forward with zero-mean V and many visible keys."""
    FP8_REL_L2.check(f"{name} relL2", rel_l2(out, reference))
    FP8_ROW_REL_L2.check(f"{name} row relL2", row_rel_l2(out, reference))
    FP8_MAX_OVER_RMS.check(f"{name} max/rms", max_abs_over_rms(out, reference))


def check_fp8_lse(name: str, lse: Tensor, reference: Tensor, bound: Bound = FP8_LSE) -> None:
    bound.check(name, max_abs(lse, reference))
