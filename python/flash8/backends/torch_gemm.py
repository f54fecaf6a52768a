"""torch's own FP8 product, `torch._scaled_mm`, as an alternative: FLASH8_GEMM says when it serves.

auto    of CUDA tensors, where no kernel of flash8 serves the product
torch   wherever it takes the product, on CPU tensors too, before the kernels
flash8  never

Its results differ from those of flash8 by the order of sums. A kind of product (scales, output,
bias, accumulation) is checked once on a device, against fp64, before torch serves it.
"""

import functools
import os
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from flash8.backends.cpu import study
from flash8.call import observed
from flash8.call.scaled_mm import Product
from flash8.tensors.float8 import E4M3

Choice = Literal["auto", "torch", "flash8"]
#: The least compute capability with products of e4m3.
_CAPABILITY = (8, 9)
_UNIT = 16  # N of torch's product on CUDA tensors is a multiple of it


@functools.cache
def choice() -> Choice:
    """FLASH8_GEMM, read once.

    Raises:
        ValueError: it is none of the three.
    """
    given = os.environ.get("FLASH8_GEMM", "") or "auto"
    for known in get_args(Choice):
        if given == known:
            return known  # type: ignore[no-any-return]
    raise ValueError(f"FLASH8_GEMM is {given!r}; supported are 'auto', 'torch' and 'flash8'")


class _Kind(NamedTuple):
    """What torch has one implementation for, or none."""

    device: torch.device
    by_row: bool  # at least one operand's scales
    out_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    fast_accum: bool
    scales_result: bool


#: What was found of a kind; None where torch's product is right.
_findings: dict[_Kind, str | None] = {}


def comes_first(product: Product) -> bool:
    """Whether torch serves this product in the place of flash8's kernels."""
    return choice() == "torch" and serves(product)


def may_serve(product: Product) -> bool:
    """Whether torch serves this product, which no kernel takes, in the place of portable code."""
    if choice() == "flash8" or (choice() == "auto" and not product.a.is_cuda):
        return False
    return serves(product)


def serves(product: Product) -> bool:
    """Whether torch takes the product, and its result has been found right on the device."""
    return (
        study.current().accumulation == "fp32"
        and refusal(product) is None
        and _fault_of(product) is None
    )


def refusal(product: Product) -> str | None:
    """Why torch's product is not for this one, or None."""
    m, n, k = product.sizes
    if product.scale_a is None:
        return "a is of 16 bits"
    if 0 in (m, n, k):
        return f"the product has no element or no sum: M, N and K are {m}, {n} and {k}"
    if product.has_blocks:
        return "scales are of blocks"
    device = product.a.device
    if device.type != "cuda":
        return None
    if n % _UNIT != 0:
        return f"N is {n}, no multiple of {_UNIT}"
    found = torch.cuda.get_device_capability(device)
    if found < _CAPABILITY:
        return f"compute capability {found[0]}.{found[1]} has no products of e4m3"
    return None


def scaled_mm(product: Product, out: Tensor) -> None:
    """Writes out (M, N)."""
    out.copy_(_multiplied(product))


def _multiplied(product: Product) -> Tensor:
    m, n, _ = product.sizes
    scale_a, scale_b = product.given_scale_a, product.scale_b
    if _is_by_row(product):
        # torch takes them by row of both operands, or of neither.
        scale_a, scale_b = scale_a.reshape(-1, 1).expand(m, 1), scale_b.reshape(1, -1).expand(1, n)
    else:
        scale_a, scale_b = scale_a.reshape(()), scale_b.reshape(())
    found: Tensor = torch._scaled_mm(
        product.a,
        product.b,
        scale_a=scale_a.contiguous(),
        scale_b=scale_b.contiguous(),
        bias=product.bias,
        scale_result=product.scale_result,
        out_dtype=product.out_dtype,
        use_fast_accum=product.fast_accum,
    )
    return found


def _is_by_row(product: Product) -> bool:
    return max(product.given_scale_a.numel(), product.scale_b.numel()) > 1


def _fault_of(product: Product) -> str | None:
    """What is wrong with torch's product of this kind, or None. The first to ask waits for it."""
    kind = _Kind(
        product.a.device,
        _is_by_row(product),
        product.out_dtype,
        None if product.bias is None else product.bias.dtype,
        product.fast_accum,
        product.scale_result is not None,
    )
    if kind not in _findings:
        from flash8.backends.hopper.verify import trust

        if observed.are_operations_observed() or trust.is_captured(kind.device):
            return "it is not checked yet, and this call would show or forbid the check"
        with trust.undisturbed(kind.device):
            _findings[kind] = _check(kind)
    return _findings[kind]


def _check(kind: _Kind) -> str | None:
    from flash8.backends.hopper.verify.gemm import differ

    try:
        for m, k in ((80, 272), (1, 16), (17, 1168)):
            product = _drawn(kind, m, 48, k)
            count = int(differ(_multiplied(product), product).sum())
            if count:
                return f"{count} of {m} x 48 elements of the product differ"
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"torch refuses it: {error}"
    return None


def _drawn(kind: _Kind, m: int, n: int, k: int) -> Product:
    generator = torch.Generator("cpu").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return x.to(kind.device)

    a, b = (4.0 * normal(m, k)).to(E4M3), (4.0 * normal(n, k)).to(E4M3).t()
    scale_a = torch.exp2(normal(m if kind.by_row else 1, 1))
    scale_b = torch.exp2(normal(1, n if kind.by_row else 1))
    bias = None if kind.bias_dtype is None else (50.0 * normal(n)).to(kind.bias_dtype)
    scale_result = torch.exp2(normal(1)) * (2.0 / k**0.5) if kind.scales_result else None
    return Product(a, b, scale_a, scale_b, bias, kind.out_dtype, kind.fast_accum, scale_result)


def describe(index: int) -> str | None:
    """When torch's product serves on the CUDA device of this number, or None if it never does."""
    if choice() == "flash8" or torch.cuda.get_device_capability(index) < _CAPABILITY:
        return None
    when = "wherever it takes the product" if choice() == "torch" else "where no kernel serves"
    return f"FLASH8_GEMM={choice()}: {when}, checked once per process"
