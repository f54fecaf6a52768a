"""The scaled product of e4m3 matrices on a compiled kernel."""

from typing import NamedTuple

import torch
from torch import Tensor

from flash8 import _native
from flash8.backends.hopper import kernels, streams
from flash8.backends.hopper.gemm_variants import (
    GemmVariant,
    InputOfA,
    choose_variant,
)
from flash8.call.scaled_mm import BLOCK, Product
from flash8.call.split_k import SMALL_M, multiprocessors, splits_of
from flash8.tensors.float8 import E4M3

ELEMENT_TYPES = {
    torch.bfloat16: _native.ElementType.BFLOAT16,
    torch.float16: _native.ElementType.FLOAT16,
    torch.float32: _native.ElementType.FLOAT32,
    E4M3: _native.ElementType.UINT8,
}
#: A's type, as variants name it.
_INPUTS: dict[torch.dtype, InputOfA] = {
    E4M3: "e4m3",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
_UNIT = 16  # bytes, of what TMA reads
_SHIFT = BLOCK.bit_length() - 1


def refusal(product: Product) -> str | None:
    """Why no kernel serves the product, or None."""
    m, n, k = product.sizes
    if 0 in (m, n, k):
        return f"the product has no element or no sum: M, N and K are {m}, {n} and {k}"
    if product.scale_a is None and m > SMALL_M:
        return f"a has {m} rows; one of 16 bits is quantized in the product up to {SMALL_M} rows"
    return None


def choose(product: Product) -> GemmVariant:
    """The kernel of a product that is not refused."""
    m, n, _ = product.sizes
    scales = "block" if product.has_blocks else "outer"
    count = multiprocessors(product.a.device)
    options = _INPUTS[product.a.dtype], splits_of(product)
    return choose_variant(scales, product.fast_accum, m, n, count, *options)


class Launch(NamedTuple):
    """A launch, and the tensors that it points to."""

    kernel: _native.Kernel
    device: int
    params: _native.GemmParams
    held: tuple[Tensor | None, ...]

    def enqueue(self, stream: int) -> None:
        _native.launch_gemm(self.kernel, self.device, stream, self.params)


def scaled_mm(product: Product, out: Tensor) -> None:
    """Enqueues the kernel that writes out (M, N). What TMA cannot read is copied before."""
    launch(choose(product), product, out)


def launch(variant: GemmVariant, product: Product, out: Tensor) -> None:
    """The same, on this kernel."""
    plan_and_launch(variant, product, out)


def plan_and_launch(variant: GemmVariant, product: Product, out: Tensor) -> Launch:
    """The same. Gives what it has enqueued."""
    found = _launch_of(variant, product, out)
    found.enqueue(streams.current_stream(product.a))
    return found


def _launch_of(variant: GemmVariant, product: Product, out: Tensor) -> Launch:
    call = _native.GemmParams()
    held = operands_of(product, call)
    call.out, call.out_stride = out.data_ptr(), out.stride(0)
    call.out_type = ELEMENT_TYPES[out.dtype]
    if product.scale_result is not None:
        call.scale_result = product.scale_result.data_ptr()
    call.splits = splits_of(product)
    device = product.a.device.index or 0
    return Launch(kernels.kernel(variant), device, call, held)


def operands_of(product: Product, call: _native.GemmParams) -> tuple[Tensor | None, ...]:
    """Fills in sizes, matrices, scales and bias. Gives the tensors that `call` points to."""
    call.m, call.n, call.k = product.sizes
    a, b = readable(product.a), readable(product.b.t())
    call.a, call.a_stride = a.data_ptr(), a.stride(0)
    call.b, call.b_stride = b.data_ptr(), b.stride(0)
    bias = product.bias
    if bias is not None:
        bias = bias.contiguous()
        call.bias, call.bias_type = bias.data_ptr(), ELEMENT_TYPES[bias.dtype]
    if product.has_blocks:
        if product.scale_a is not None:
            by_row, by_block_a = product.scale_a.stride()
            call.scale_a = (product.scale_a.data_ptr(), by_row, by_block_a)
        by_block, by_column = product.scale_b.stride()
        call.scale_b = (product.scale_b.data_ptr(), by_column, by_block)
        call.scale_a_row_shift = _SHIFT if product.rows_per_scale == BLOCK else 0
    else:
        scale_a = product.given_scale_a
        call.scale_a = (scale_a.data_ptr(), _stride(scale_a, 0), 0)
        call.scale_b = (product.scale_b.data_ptr(), _stride(product.scale_b, 1), 0)
    return a, b, bias


def _stride(scale: Tensor, dim: int) -> int:
    """Between the scales of rows, or columns; 0 where there is one for all."""
    return 0 if scale.numel() == 1 else scale.stride(dim)


def readable(x: Tensor) -> Tensor:
    """(rows, K) or (groups, rows, K), contiguous along K: as it lies, or a copy."""
    strides = [x.stride(i) for i in range(x.dim() - 1) if x.shape[i] > 1]
    size = x.element_size()
    fits = all(step * size % _UNIT == 0 and step >= x.shape[-1] for step in strides)
    if x.data_ptr() % _UNIT == 0 and fits:
        return x
    return x.clone(memory_format=torch.contiguous_format)
