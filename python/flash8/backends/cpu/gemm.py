"""The scaled product on CPU tensors, in the order of operations of the kernels.

Blocks of 128 of K are multiplied in fp32 and added to a sum in fp32, with scales of blocks as
sum + scale * t. Scales of tensors and rows multiply the sum, then the bias is added, an e4m3 output
is scaled, and the result is rounded to its type. `flash8.fp8.study(accumulation="hopper")`
multiplies as the tensor cores do, and rounds as the kernels do, bit by bit: sum + scale * t once.
"""

import torch
from torch import Tensor

from flash8.backends.cpu import study, tensor_core
from flash8.backends.cpu.quantize_matrix import quantize_matrix
from flash8.call.request import MatrixRequest
from flash8.call.scaled_mm import BLOCK, Product
from flash8.tensors.float8 import E4M3, saturating_cast, widened


def scaled_mm(product: Product, out: Tensor) -> None:
    """Writes out (M, N), of product.out_dtype."""
    product = with_quantized_a(product)
    a, b = widened(product.a), widened(product.b)
    emulates = study.current().accumulation == "hopper"
    total = _by_blocks(product, a, b, emulates) if product.has_blocks else _plain(product, a, b)
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


def _plain(product: Product, a: Tensor, b: Tensor) -> Tensor:
    """With a scale of the tensor or of a row for all of K."""
    m, n, k = product.sizes
    emulates = study.current().accumulation == "hopper"
    if product.fast_accum:
        total = tensor_core.matmul(a, b) if emulates else a @ b
    else:
        total = a.new_zeros((m, n))
        for begin in range(0, k, BLOCK):
            block = slice(begin, begin + BLOCK)
            if emulates:
                total += tensor_core.matmul(a[:, block], b[block])
            else:
                total.addmm_(a[:, block], b[block])
    scale_a, scale_b = product.given_scale_a, product.scale_b
    if scale_a.numel() == 1:
        scale_a = scale_a.reshape(1, 1)
    if scale_b.numel() == 1:
        scale_b = scale_b.reshape(1, 1)
    return total.mul_(scale_a * scale_b)


def _by_blocks(product: Product, a: Tensor, b: Tensor, emulates: bool) -> Tensor:
    m, n, k = product.sizes
    scale_a = product.given_scale_a
    if product.rows_per_scale == BLOCK:
        scale_a = scale_a.repeat_interleave(BLOCK, 0)[:m]
    total = a.new_zeros((m, n))
    for i, begin in enumerate(range(0, k, BLOCK)):
        block = slice(begin, begin + BLOCK)
        of_columns = product.scale_b[i].repeat_interleave(BLOCK)[:n]
        scale = scale_a[:, i, None] * of_columns
        if emulates:
            t = tensor_core.matmul(a[:, block], b[block])
            total = fused_multiply_add(scale, t, total)
        else:
            total.addcmul_(a[:, block] @ b[block], scale)
    return total


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
