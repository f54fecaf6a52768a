"""The torch ops of scaled matrix products.

They are traced as they are; which kernel is trusted is asked when they run."""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from flash8 import backends
from flash8.backends import torch_gemm
from flash8.backends.cpu import gemm as portable
from flash8.backends.hopper import gemm as hopper
from flash8.backends.hopper.verify import trust
from flash8.call import derivatives
from flash8.call.autocast import unaffected
from flash8.call.scaled_mm import Product
from flash8.ops.quantize_matrix import quantize_matrix

_library = torch.library.Library("flash8", "FRAGMENT")
_ARGUMENTS = (
    "Tensor a, Tensor b, Tensor? scale_a, Tensor scale_b, Tensor? bias, Tensor? scale_result"
)
_OPTIONS = "bool fast_accum, int split_k=1"
_library.define(f"scaled_mm({_ARGUMENTS}, ScalarType out_dtype, {_OPTIONS}) -> Tensor")
_library.define(f"scaled_mm_into(Tensor(a!) out, {_ARGUMENTS}, {_OPTIONS}) -> ()")


def scaled_mm(product: Product, out: Tensor | None) -> Tensor:
    """The product, in `out` where that is given."""
    a, b, scale_a, scale_b, bias, out_dtype, fast_accum, scale_result, split_k = product
    if out is None:
        found: Tensor = torch.ops.flash8.scaled_mm(
            a, b, scale_a, scale_b, bias, scale_result, out_dtype, fast_accum, split_k
        )
        return found
    torch.ops.flash8.scaled_mm_into(
        out, a, b, scale_a, scale_b, bias, scale_result, fast_accum, split_k
    )
    return out


def _scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor | None,
    scale_b: Tensor,
    bias: Tensor | None,
    scale_result: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
    split_k: int = 1,
) -> Tensor:
    product = Product(a, b, scale_a, scale_b, bias, out_dtype, fast_accum, scale_result, split_k)
    out = empty_out(product)
    _fill(out, product)
    return out


def _scaled_mm_fake(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor | None,
    scale_b: Tensor,
    bias: Tensor | None,
    scale_result: Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
    split_k: int = 1,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


def _scaled_mm_into(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor | None,
    scale_b: Tensor,
    bias: Tensor | None,
    scale_result: Tensor | None,
    fast_accum: bool,
    split_k: int = 1,
) -> None:
    increment_version((out,))  # a kernel writes past torch
    given = a, b, scale_a, scale_b, bias, out.dtype, fast_accum, scale_result, split_k
    _fill(out, Product(*given))


def _scaled_mm_into_fake(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor | None,
    scale_b: Tensor,
    bias: Tensor | None,
    scale_result: Tensor | None,
    fast_accum: bool,
    split_k: int = 1,
) -> None:
    return None


def _fill(out: Tensor, product: Product) -> None:
    if is_for_kernels(product):
        hopper.scaled_mm(product, out)
    elif torch_gemm.may_serve(product):
        torch_gemm.scaled_mm(product, out)
    elif product.scale_a is None:
        a, scale_a = quantize_matrix(product.a, "1x128")
        _fill(out, product._replace(a=a, scale_a=scale_a))
    else:
        portable.scaled_mm(product, out)


def empty_out(product: Product) -> Tensor:
    m, n, _ = product.sizes
    return product.a.new_empty((m, n), dtype=product.out_dtype)


def is_for_kernels(product: Product) -> bool:
    """Whether a kernel serves it."""
    if torch_gemm.comes_first(product):
        return False
    if not backends.kernels_wanted(product.a):
        if not torch_gemm.may_serve(product):
            backends.backend_for(product.a)  # which tells about CUDA tensors that have no kernel
        return False
    reason = hopper.refusal(product)
    if reason is not None:
        return False  # nothing is multiplied
    return trust.is_trusted(hopper.choose(product), product.a.device)


_REFUSAL = (
    "flash8.gemm.scaled_mm has no derivative: float8 tensors carry no gradient; call it under "
    "torch.no_grad(), and detach what is differentiated"
)
for _name, _function, _fake in (
    ("scaled_mm", _scaled_mm, _scaled_mm_fake),
    ("scaled_mm_into", _scaled_mm_into, _scaled_mm_into_fake),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, unaffected(_function), _key)
    torch.library.register_fake(f"flash8::{_name}", _fake, lib=_library)
    derivatives.refuse(_library, _name, _REFUSAL)
