"""The torch ops of grouped matrix products.

They are traced as they are; which kernel is trusted is asked when they run."""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from flash8 import backends
from flash8.backends.cpu import grouped_gemm as portable
from flash8.backends.hopper import grouped_gemm as hopper
from flash8.backends.hopper.verify import trust
from flash8.call import derivatives
from flash8.call.autocast import unaffected
from flash8.call.grouped_scaled_mm import GroupedProduct, out_shape

_library = torch.library.Library("flash8", "FRAGMENT")
_ARGUMENTS = "Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor group_rows"
_library.define(f"grouped_scaled_mm({_ARGUMENTS}, ScalarType out_dtype, bool fast_accum) -> Tensor")
_library.define(f"grouped_scaled_mm_into(Tensor(a!) out, {_ARGUMENTS}, bool fast_accum) -> ()")


def grouped_scaled_mm(product: GroupedProduct, out: Tensor | None) -> Tensor:
    """The product, in `out` where that is given."""
    *tensors, out_dtype, fast_accum = product
    if out is None:
        found: Tensor = torch.ops.flash8.grouped_scaled_mm(*tensors, out_dtype, fast_accum)
        return found
    torch.ops.flash8.grouped_scaled_mm_into(out, *tensors, fast_accum)
    return out


def _grouped_scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    group_rows: Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
) -> Tensor:
    product = GroupedProduct(a, b, scale_a, scale_b, group_rows, out_dtype, fast_accum)
    out = empty_out(product)
    _fill(out, product)
    return out


def _grouped_scaled_mm_fake(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    group_rows: Tensor,
    out_dtype: torch.dtype,
    fast_accum: bool,
) -> Tensor:
    return a.new_empty(out_shape(a, b, group_rows), dtype=out_dtype)


def _grouped_scaled_mm_into(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    group_rows: Tensor,
    fast_accum: bool,
) -> None:
    increment_version((out,))  # a kernel writes past torch
    _fill(out, GroupedProduct(a, b, scale_a, scale_b, group_rows, out.dtype, fast_accum))


def _grouped_scaled_mm_into_fake(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    group_rows: Tensor,
    fast_accum: bool,
) -> None:
    return None


def _fill(out: Tensor, product: GroupedProduct) -> None:
    backend = hopper if is_for_kernels(product) else portable
    backend.grouped_scaled_mm(product, out)


def empty_out(product: GroupedProduct) -> Tensor:
    return product.a.new_empty(product.out_shape, dtype=product.out_dtype)


def is_for_kernels(product: GroupedProduct) -> bool:
    """Whether a kernel serves it."""
    if not backends.kernels_wanted(product.a):
        backends.backend_for(product.a)  # which tells about CUDA tensors that have no kernel
        return False
    if hopper.refusal(product) is not None:
        return False  # nothing is multiplied
    return trust.is_trusted(hopper.choose(product), product.a.device)


_REFUSAL = (
    "flash8.gemm.grouped_scaled_mm has no derivative: float8 tensors carry no gradient; call it "
    "under torch.no_grad(), and detach what is differentiated"
)
for _name, _function, _fake in (
    ("grouped_scaled_mm", _grouped_scaled_mm, _grouped_scaled_mm_fake),
    ("grouped_scaled_mm_into", _grouped_scaled_mm_into, _grouped_scaled_mm_into_fake),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, unaffected(_function), _key)
    torch.library.register_fake(f"flash8::{_name}", _fake, lib=_library)
    derivatives.refuse(_library, _name, _REFUSAL)
