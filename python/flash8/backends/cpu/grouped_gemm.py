"""The grouped product on CPU tensors: of each group the product of `gemm.py`, with its bits."""

from collections.abc import Iterator

from torch import Tensor

from flash8.backends.cpu import gemm
from flash8.call.grouped_scaled_mm import GroupedProduct
from flash8.call.scaled_mm import Product


def grouped_scaled_mm(product: GroupedProduct, out: Tensor) -> None:
    """Writes out (M, N), of product.out_dtype: zeros where a row has no group. Of groups that lie
    apart it writes the rows that they have, in out (G, rows, N), and leaves the others alone."""
    if not product.is_apart:
        out.zero_()
    scale_a, scale_b = product.scales()
    for group, rows in row_ranges(product):
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


def row_ranges(product: GroupedProduct) -> Iterator[tuple[int, slice]]:
    """Of each group that has rows. Reads group_rows, which may hold anything: what is negative, too
    large or, as an offset, less than one before it is clamped as the kernel does."""
    _, rows, _, _ = product.sizes
    begin = 0
    for group, value in enumerate(product.group_rows.tolist()):
        end = min(max(value, begin), rows)
        if end > begin:
            yield group, slice(begin, end)
        begin = 0 if product.is_apart else end
