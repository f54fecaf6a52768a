"""The grouped product of e4m3 matrices on a compiled kernel, which finds the groups' rows itself:
nothing here depends on how many there are."""

from torch import Tensor

from flash8 import _native
from flash8.backends.hopper import kernels, streams
from flash8.backends.hopper.gemm import ELEMENT_TYPES, Launch, readable
from flash8.backends.hopper.gemm_variants import SHIPPED_GROUPED_GEMMS, GemmVariant
from flash8.call.grouped_scaled_mm import GroupedProduct


def refusal(product: GroupedProduct) -> str | None:
    """Why no kernel serves the product, or None."""
    groups, rows, n, k = product.sizes
    if 0 in (groups, rows, n, k):
        return (
            "the product has no group, no element or no sum: groups, M, N and K are "
            f"{groups}, {rows}, {n} and {k}"
        )
    return None


def choose(product: GroupedProduct) -> GemmVariant:
    """The kernel of a product that is not refused."""
    return next(
        variant
        for variant in SHIPPED_GROUPED_GEMMS
        if variant.grouped_k == product.is_along_k
        and (variant.scales == "block") == product.has_blocks
        and variant.fast_accum == product.fast_accum
    )


def grouped_scaled_mm(product: GroupedProduct, out: Tensor) -> None:
    """Enqueues the kernel that writes out. What TMA cannot read is copied before."""
    launch(choose(product), product, out)


def launch(variant: GemmVariant, product: GroupedProduct, out: Tensor) -> None:
    """The same, on this kernel."""
    plan_and_launch(variant, product, out)


def plan_and_launch(variant: GemmVariant, product: GroupedProduct, out: Tensor) -> Launch:
    """The same. Gives what it has enqueued."""
    found = _launch_of(variant, product, out)
    found.enqueue(streams.current_stream(product.a))
    return found


def _launch_of(variant: GemmVariant, product: GroupedProduct, out: Tensor) -> Launch:
    groups, rows, n, k = product.sizes
    a, b = readable(product.a.reshape(-1, k)), readable(product.b.mT)
    group_rows = product.group_rows.contiguous()
    scale_a, scale_b = product.scales()
    call = _native.GemmParams()
    call.m, call.n, call.k = a.shape[0], n, k
    call.a, call.a_stride = a.data_ptr(), a.stride(0)
    call.b, call.b_stride = b.data_ptr(), b.stride(-2)
    call.b_group_stride = 0 if product.is_along_k else b.stride(0)
    # Groups apart are contiguous; of a dimension of one that says nothing about its stride.
    call.out, call.out_stride = out.data_ptr(), out.view(-1, n).stride(0)
    call.out_type = ELEMENT_TYPES[out.dtype]
    call.groups, call.group_rows = groups, group_rows.data_ptr()
    call.scale_a = (scale_a.data_ptr(), scale_a.stride(1), scale_a.stride(2))
    call.scale_b = (scale_b.data_ptr(), scale_b.stride(2), scale_b.stride(1))
    call.scale_a_group_stride, call.scale_b_group_stride = scale_a.stride(0), scale_b.stride(0)
    if product.is_apart:
        call.rows_per_group = rows
        # The kernel counts rows over all groups.
        call.scale_a_group_stride -= rows * scale_a.stride(1)
    device = product.a.device.index or 0
    return Launch(kernels.kernel(variant), device, call, (a, b, group_rows))
