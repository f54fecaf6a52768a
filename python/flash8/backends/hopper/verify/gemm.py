"""A GEMM kernel against the product in fp64: ragged sizes, strided scales, every output type."""

from collections.abc import Iterator

import torch
from torch import Tensor

from flash8.backends.cpu.gemm import with_quantized_a
from flash8.backends.hopper import gemm as hopper
from flash8.backends.hopper.gemm_variants import GemmVariant
from flash8.backends.hopper.verify.watchdog import Watchdog
from flash8.call.scaled_mm import BLOCK, Product, blocks_of
from flash8.call.split_k import multiprocessors
from flash8.tensors.float8 import E4M3, MAX, saturating_cast

#: Of an element, relative to the sum of the magnitudes of its products: what the tensor core's 14
#: bits lose of it, promoted or not. A product too many or too few, or another scale, is far more.
_TOLERANCE = 2.0**-11
#: And of its type.
_ROUNDING = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-10,
    torch.float32: 2.0**-22,
    E4M3: 2.0**-4,
}
_SMALLEST_E4M3 = 2.0**-9
#: What a kernel quantizes itself.
_WIDE_A = {"bf16": torch.bfloat16, "fp16": torch.float16}


def find_fault(variant: GemmVariant, device: torch.device) -> str | None:
    """What is wrong with the kernel, or None. Raises what loading and launching it raise."""
    for product in Draw(variant, device).products():
        fault = find_fault_of(variant, product)
        if fault is not None:
            return fault
    return None


def find_fault_of(variant: GemmVariant, product: Product) -> str | None:
    """What is wrong with the kernel's output for this product, or None."""
    m, n, _ = product.sizes
    out = product.a.new_full((m, n), torch.nan, dtype=torch.float32).to(product.out_dtype)
    watchdog = Watchdog(out.device)
    hopper.launch(variant, product, out)
    watchdog.wait()
    count = int(differ(out, product).sum())
    return None if count == 0 else f"{count} of {m} x {n} elements of the product differ"


def differ(out: Tensor, product: Product) -> Tensor:
    """Where `out` is none that a sound kernel may write."""
    want, magnitude = reference(product)
    bound = _TOLERANCE * magnitude + _ROUNDING[out.dtype] * want.abs()
    if out.dtype == E4M3:
        bound, want = bound + _SMALLEST_E4M3, want.clamp(-MAX[E4M3], MAX[E4M3])
    return ~((out.double() - want).abs() <= bound)  # NaN is wrong


def reference(product: Product) -> tuple[Tensor, Tensor]:
    """The product in fp64, and the sums of the magnitudes of what it adds up."""
    product = with_quantized_a(product)
    m, n, k = product.sizes
    a, b = product.a.float().double(), product.b.float().double()
    scale_a, scale_b = product.given_scale_a.double(), product.scale_b.double()
    if product.has_blocks:
        scale_a = scale_a.repeat_interleave(product.rows_per_scale, 0)[:m]
        scale_a = scale_a.repeat_interleave(BLOCK, 1)[:, :k]
        scale_b = scale_b.repeat_interleave(BLOCK, 0)[:k].repeat_interleave(BLOCK, 1)[:, :n]
    a, b = a * scale_a, b * scale_b
    want, magnitude = a @ b, a.abs() @ b.abs()
    if product.bias is not None:
        bias = product.bias.double()
        want, magnitude = want + bias, magnitude + bias.abs()
    if product.scale_result is not None:
        scale = product.scale_result.double()
        want, magnitude = want * scale, magnitude * scale
    return want, magnitude


class Draw:
    """Random products for a variant. They are drawn on the CPU: the same on every device."""

    def __init__(self, variant: GemmVariant, device: torch.device) -> None:
        self.variant, self.device = variant, device
        self._quantizes = variant.a in _WIDE_A
        self._generator = torch.Generator("cpu").manual_seed(1)

    def products(self) -> Iterator[Product]:
        """More K than stages hold, at the end of a tile and beyond; rows that are stored by single
        elements; one row. Tiles of more than one CTA, with and without the last one's rows. On a
        GPU CTAs that go on to a second tile: a simulated device would take minutes for all of its
        multiprocessors."""
        half, bfloat, full = torch.float16, torch.bfloat16, torch.float32
        m, n = self.variant.block_m, self.variant.block_n
        deep = 3088 if self.variant.small_m else 1168
        yield self._product(m + 72, n + 72, deep, full, None)
        yield self._product(m + 1, n + 13, 400, bfloat, full)
        yield self._product(1, 136, 16, half, half)
        yield self._product(70, n + 8, 144, E4M3, bfloat)
        yield self._product(70, 48, 144, E4M3, None)
        if self.variant.splits:
            # CTAs that share K: equal ranges and unequal ones, a part of a warp's sums each.
            for splits, rows, k in ((2, m, 1040), (4, m - 1, 3088), (8, m, 1168)):
                split = self._product(rows, n + 13, k, bfloat, full)
                yield split._replace(split_k=splits)
        if self.variant.scales == "block":
            yield self._product(m + 130, 48, 272, bfloat, bfloat, shared=True)
        else:
            yield self._product(130, 48, 272, bfloat, bfloat, shared=True)
        if self.device.type == "cuda":
            yield self.of_more_tiles(multiprocessors(self.device))

    def of_more_tiles(self, count: int) -> Product:
        """A product of more tiles than `count`, in 11 rows of them or fewer."""
        rows = min(11, count)
        columns = count // rows + 1
        m = self.variant.block_m * rows - self.variant.block_m // 3
        n = self.variant.block_n * columns - self.variant.block_n * 2 // 3
        return self._product(m, n, 272, torch.bfloat16, torch.bfloat16)

    def _product(
        self,
        m: int,
        n: int,
        k: int,
        out_dtype: torch.dtype,
        bias_dtype: torch.dtype | None,
        shared: bool = False,
    ) -> Product:
        """`shared`: rows of A share scales, by 128 or all of them."""
        wide = self.normal(m, k) * 4.0
        a = wide.to(_WIDE_A[self.variant.a]) if self._quantizes else saturating_cast(wide)
        b = saturating_cast(self.normal(n, k) * 4.0).t()
        scale_a, scale_b = self._scales(m, n, k, shared)
        bias = None if bias_dtype is None else (self.normal(n) * 50.0).to(bias_dtype)
        # Most of an e4m3 output lies within the range, and some of it does not.
        scale_result = None
        if out_dtype == E4M3:
            scale_result = self.scale(1) * (0.1 * MAX[E4M3] / (16.0 * k**0.5))
        fast = self.variant.fast_accum
        given = None if self._quantizes else scale_a
        return Product(a, b, given, scale_b, bias, out_dtype, fast, scale_result)

    def _scales(self, m: int, n: int, k: int, shared: bool) -> tuple[Tensor, Tensor]:
        """A's by column of scales, as some quantizers write them; B's by row."""
        if self.variant.scales == "block":
            rows = blocks_of(m) if shared else m
            return self.scale(blocks_of(k), rows).t(), self.scale(blocks_of(k), blocks_of(n))
        if shared:
            return self.scale(1, 1), self.scale(1, 1)
        return self.scale(m, 2)[:, :1], self.scale(1, n)

    def scale(self, *shape: int) -> Tensor:
        return torch.exp2(self.normal(*shape))

    def normal(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return x.to(self.device)
