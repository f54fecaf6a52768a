"""The scaled product on CPU tensors, in the order of operations of the kernels.

Blocks of 128 of K are multiplied in fp32 and added to a sum in fp32, with scales of blocks as
sum + scale * t. With `split_k` ranges of K have sums of their own, which are added in the order of
K. Scales of tensors and rows multiply the sum, then the bias is added, an e4m3 output is scaled,
and the result is rounded to its type. `flash8.fp8.study(accumulation="hopper")` multiplies as the
tensor cores do, and rounds as the kernels do, bit by bit: sum + scale * t once.
"""

import torch
from torch import Tensor

from flash8.backends.cpu import study, tensor_core
from flash8.backends.cpu.quantize_matrix import quantize_matrix
from flash8.call.request import MatrixRequest
from flash8.call.scaled_mm import BLOCK, Product
from flash8.call.split_k import ranges, splits_of
from flash8.tensors.float8 import E4M3, saturating_cast, widened


def scaled_mm(product: Product, out: Tensor) -> None:
    """Writes out (M, N), of product.out_dtype."""
    product = with_quantized_a(product)
    a, b = widened(product.a), widened(product.b)
    total = _sum(product, a, b)
    if not product.has_blocks:
        total = total.mul_(_outer_scale(product))
    if product.bias is not None:
        total = total + product.bias.float()
    if product.scale_result is not None:
        total = total * product.scale_result.reshape(1, 1)
    out.copy_(saturating_cast(total) if out.dtype == E4M3 else total)


def with_quantized_a(product: Product) -> Product:
    """The same with an A of e4m3, whose scales are by 1x128 where it is of 16 bits."""
    if product.scale_a is not None:
        return product
    a8, scale, _ = quantize_matrix(MatrixRequest(product.a, "1x128"))
    return product._replace(a=a8, scale_a=scale)


def _sum(product: Product, a: Tensor, b: Tensor) -> Tensor:
    """(M, N), over all of K: of the blocks in turn, or split, of ranges of them."""
    emulates = study.current().accumulation == "hopper"
    if product.fast_accum:
        return tensor_core.matmul(a, b) if emulates else a @ b
    add = _add_scaled_block if product.has_blocks else _add_block
    m, n, k = product.sizes
    total = a.new_zeros((m, n))
    for i, blocks in enumerate(ranges(k, splits_of(product))):
        part = total if i == 0 else a.new_zeros((m, n))
        for block in blocks:
            of_k = slice(block * BLOCK, (block + 1) * BLOCK)
            part = add(product, block, a[:, of_k], b[of_k], part, emulates)
        total = part if i == 0 else total + part
    return total


def _add_block(
    product: Product, block: int, a: Tensor, b: Tensor, total: Tensor, emulates: bool
) -> Tensor:
    """total + a @ b; it may be written to."""
    if emulates:
        return total.add_(tensor_core.matmul(a, b))
    return total.addmm_(a, b)


def _add_scaled_block(
    product: Product, block: int, a: Tensor, b: Tensor, total: Tensor, emulates: bool
) -> Tensor:
    """The same with the scales of this block of K."""
    m, n, _ = product.sizes
    of_rows = product.given_scale_a[:, block, None]
    if product.rows_per_scale == BLOCK:
        of_rows = of_rows.repeat_interleave(BLOCK, 0)[:m]
    scale = of_rows * product.scale_b[block].repeat_interleave(BLOCK)[:n]
    if emulates:
        return fused_multiply_add(scale, tensor_core.matmul(a, b), total)
    return total.addcmul_(a @ b, scale)


def _outer_scale(product: Product) -> Tensor:
    """Of a tensor or of rows, for all of K: (M, N), or 1 where it is one for all."""
    scale_a, scale_b = product.given_scale_a, product.scale_b
    if scale_a.numel() == 1:
        scale_a = scale_a.reshape(1, 1)
    if scale_b.numel() == 1:
        scale_b = scale_b.reshape(1, 1)
    return scale_a * scale_b


def fused_multiply_add(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x * y + z of fp32 tensors, rounded once.

    The product is exact in fp64. The sum is rounded to odd there, so that the second rounding, to
    fp32, sees on which side of a tie it was: Boldo and Melquiond, "Emulation of FMA and correctly
    rounded sums", 2008.
    """
    product, addend = x.double() * y.double(), z.double()
    total = product + addend
    share = total - product
    error = (product - (total - share)) + (addend - share)
    is_even = (total.view(torch.int64) & 1) == 0
    towards = torch.copysign(torch.full_like(total, torch.inf), error)
    odd = torch.nextafter(total, towards)
    return torch.where(is_even & (error != 0) & error.isfinite(), odd, total).float()
