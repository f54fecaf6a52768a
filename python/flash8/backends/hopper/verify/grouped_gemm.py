"""A grouped GEMM kernel against the products of its groups in fp64: groups of all sizes, one after
another, apart and along K, and indices that mean nothing."""

from collections.abc import Iterator

import torch
from torch import Tensor

from flash8.backends.cpu.grouped_gemm import along_k, ranges
from flash8.backends.hopper import grouped_gemm as hopper
from flash8.backends.hopper.gemm_variants import GemmVariant
from flash8.backends.hopper.verify import gemm
from flash8.backends.hopper.verify.watchdog import Watchdog
from flash8.call.grouped_scaled_mm import GroupedProduct
from flash8.call.scaled_mm import Product, blocks_of
from flash8.call.split_k import multiprocessors
from flash8.tensors.float8 import saturating_cast


def find_fault(variant: GemmVariant, device: torch.device) -> str | None:
    """What is wrong with the kernel, or None. Raises what loading and launching it raise."""
    for product in Draw(variant, device).products():
        fault = find_fault_of(variant, product)
        if fault is not None:
            return fault
    return None


def find_fault_of(variant: GemmVariant, product: GroupedProduct) -> str | None:
    """What is wrong with the kernel's output for this product, or None."""
    shape = product.out_shape
    out = product.a.new_full(shape, torch.nan, dtype=torch.float32).to(product.out_dtype)
    watchdog = Watchdog(out.device)
    hopper.launch(variant, product, out)
    watchdog.wait()
    count = int(_differ(out, product).sum())
    return None if count == 0 else f"{count} of {shape} elements of the product differ"


def _differ(out: Tensor, product: GroupedProduct) -> Tensor:
    """Where `out`, which was NaN, is wrong: a product, what is left alone or, where no group has
    the row or a group no K, zero."""
    wrong = ~out.isnan() if product.is_apart else out != 0.0
    if product.is_along_k:
        for group, part in ranges(product):
            wrong[group] = gemm.differ(out[group], along_k(product, group, part))
        return wrong
    scale_a, scale_b = product.scales()
    for group, rows in ranges(product):
        index = (group, rows) if product.is_apart else (rows,)
        scales = scale_a[group, rows], scale_b[group]
        of_group = Product(product.a[index], product.b[group], *scales, None, out.dtype)
        wrong[index] = gemm.differ(out[index], of_group)
    return wrong


class Draw(gemm.Draw):
    """Random grouped products for a variant."""

    def products(self) -> Iterator[GroupedProduct]:  # type: ignore[override]
        """A group of more than a tile between groups of a row and of none, and rows of no group;
        more groups than a warp has lanes; offsets that decrease or lie outside; groups apart. On a
        GPU CTAs that go on to a second tile."""
        if self.variant.grouped_k:
            yield from self._products_along_k()
            return
        half, bfloat, full = torch.float16, torch.bfloat16, torch.float32
        m, n = self.variant.block_m, self.variant.block_n
        yield self._product([0, m + 5, m + 5, m + 6, m + 70], m + 79, n + 72, 1168, full)
        yield self._product([i * i // 20 for i in range(70)], 240, 13, 144, bfloat)
        yield self._product([60, -7, 30, 90, 2**31 - 1, 0], 100, 48, 272, half)
        yield self._product([-1, 0, 300, 37], 70, 136, 400, bfloat, apart=True)
        if self.device.type == "cuda":
            yield self.of_more_tiles_in_groups(multiprocessors(self.device))

    def of_more_tiles_in_groups(self, count: int) -> GroupedProduct:
        """A product of more tiles than `count`, in up to 11 groups of two rows of them."""
        groups = min(11, count)
        columns = count // groups + 1
        rows = self.variant.block_m + 3
        ends = [rows * (group + 1) for group in range(groups)]
        n = self.variant.block_n * columns - 88
        return self._product(ends, rows * groups, n, 272, torch.bfloat16)

    def _products_along_k(self) -> Iterator[GroupedProduct]:
        """Groups that end anywhere in a stage of K, several in one, and of more K than stages hold;
        without any K; K of no group. More groups than a warp has lanes, offsets that decrease or
        lie outside. On a GPU CTAs that go on to a second tile."""
        half, bfloat, full = torch.float16, torch.bfloat16, torch.float32
        m, n = self.variant.block_m, self.variant.block_n
        ends = [0, 5, 128, 128, 171, 1300, 1301]
        yield self._along_k(ends, m + 5, n + 72, 1312, full)
        yield self._along_k([i * i // 20 for i in range(70)], 20, 13, 256, bfloat)
        yield self._along_k([60, -7, 30, 190, 2**31 - 1, 0], 1, 48, 272, half)
        if self.device.type == "cuda":
            rows = m * (multiprocessors(self.device) // 2)
            yield self._along_k([7, 300, 300, 700], rows, n + 8, 720, bfloat)

    def _along_k(
        self, ends: list[int], m: int, n: int, k: int, out_dtype: torch.dtype
    ) -> GroupedProduct:
        """What no group has of K is NaN, which must not show."""
        groups = len(ends)
        a, b = (saturating_cast(self.normal(rows, k) * 4.0) for rows in (m, n))
        for x in (a, b):
            x.view(torch.uint8)[:, min(k, max(ends)) :] = 0x7F
        if self.variant.scales == "block":
            scale_a = self.scale(blocks_of(k), m).t()
            scale_b = self.scale(blocks_of(k), blocks_of(n))
        else:
            scale_a, scale_b = self.scale(groups * m), self.scale(groups * n)
        index = torch.tensor(ends, dtype=torch.int32).to(self.device)
        fast = self.variant.fast_accum
        return GroupedProduct(a, b.t(), scale_a, scale_b, index, out_dtype, fast)

    def _product(  # type: ignore[override]
        self,
        group_rows: list[int],
        rows: int,
        n: int,
        k: int,
        out_dtype: torch.dtype,
        apart: bool = False,
    ) -> GroupedProduct:
        """`rows` of all groups, or of each that lies apart."""
        groups = len(group_rows)
        shape = (groups, rows) if apart else (rows,)
        a = saturating_cast(self.normal(*shape, k) * 4.0)
        b = saturating_cast(self.normal(groups, n, k) * 4.0).transpose(1, 2)
        if self.variant.scales == "block":
            scale_a = self.scale(blocks_of(k), *shape).movedim(0, -1)
            scale_b = self.scale(groups, blocks_of(k), blocks_of(n))
        else:
            scale_a = self.scale(*shape, 2)[..., :1]
            scale_b = self.scale(groups, 1, 1) if apart else self.scale(groups, n)
        index = torch.tensor(group_rows, dtype=torch.int32).to(self.device)
        fast = self.variant.fast_accum
        return GroupedProduct(a, b, scale_a, scale_b, index, out_dtype, fast)
