"""The grouped product on CPU tensors: of each group the product of `gemm.py`, with its bits."""

from collections.abc import Iterator

import torch
from torch import Tensor

from flash8.backends.cpu import gemm
from flash8.call.grouped_scaled_mm import GroupedProduct
from flash8.call.scaled_mm import BLOCK, Product, blocks_of


def grouped_scaled_mm(product: GroupedProduct, out: Tensor) -> None:
    """Writes out (M, N), of product.out_dtype: zeros where a row has no group. Of groups that lie
    apart it writes the rows that they have, in out (G, rows, N), and leaves the others alone. Along
    K it writes all of out (G, M, N): zeros where a group is empty."""
    if product.is_along_k:
        out.zero_()
        for group, part in ranges(product):
            gemm.scaled_mm(along_k(product, group, part), out[group])
        return
    if not product.is_apart:
        out.zero_()
    scale_a, scale_b = product.scales()
    for group, rows in ranges(product):
        index = (group, rows) if product.is_apart else (rows,)
        of_group = Product(
            product.a[index],
            product.b[group],
            scale_a[group, rows],
            scale_b[group],
            None,
            product.out_dtype,
            product.fast_accum,
        )
        gemm.scaled_mm(of_group, out[index])


def along_k(product: GroupedProduct, group: int, part: slice) -> Product:
    """That of a group which has this part of K. Scales of blocks are those of blocks of all of K:
    where the group begins inside of one, there are zeros before it."""
    scale_a, scale_b = (scale[group] for scale in product.scales())
    a, b = product.a[:, part], product.b[part]
    if product.has_blocks:
        first, last = part.start // BLOCK, blocks_of(part.stop)
        scale_a, scale_b = scale_a[:, first:last], scale_b[first:last]
        before = part.start - first * BLOCK
        a = torch.cat([a.new_zeros(a.shape[0], before), a], 1)
        b = torch.cat([b.new_zeros(before, b.shape[1]), b])
    dtype, fast = product.out_dtype, product.fast_accum
    return Product(a, b, scale_a, scale_b, None, dtype, fast)


def ranges(product: GroupedProduct) -> Iterator[tuple[int, slice]]:
    """Rows, or K, of each group that has some. Reads group_rows, which may hold anything: what is
    negative, too large or, as an offset, less than one before it is clamped as the kernel does."""
    _, rows, _, k = product.sizes
    most = k if product.is_along_k else rows
    begin = 0
    for group, value in enumerate(product.group_rows.tolist()):
        end = min(max(value, begin), most)
        if end > begin:
            yield group, slice(begin, end)
        begin = 0 if product.is_apart else end
