"""Scaled products on the simulated device, and the bits that they must have."""

import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash8 import _native, fp8
from flash8.backends.cpu import gemm as portable
from flash8.backends.hopper import gemm as hopper
from flash8.backends.hopper.gemm_variants import GemmVariant
from flash8.backends.hopper.kernels import variant_of
from flash8.call.scaled_mm import Product, blocks_of
from flash8.compiler import Unit, compile_unit, cutlass_root
from flash8.tensors.float8 import E4M3, saturating_cast
from simulated_device import SimulatedDevice

#: Granularities of A and of B.
GRANULARITIES = ("tensor", "row", "1x128", "128x128")
_WORDS = {2: torch.int16, 4: torch.int32}


class _Device(SimulatedDevice):
    """With five multiprocessors, so that CTAs walk several tiles, in bands of two rows of them."""

    def configure(self, **settings: Any) -> None:
        super().configure(**{"multiprocessors": 5, **settings})


@functools.cache
def device() -> SimulatedDevice:
    return _Device()


def values(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * scale


def make(
    m: int,
    n: int,
    k: int,
    granularity: str = "1x128",
    *,
    out_dtype: torch.dtype = torch.float32,
    bias: torch.dtype | None = None,
    fast: bool = False,
    seed: int = 0,
) -> Product:
    """Scales over three powers of two, of strides that no quantizer of torch would choose. Of an
    e4m3 output some elements are beyond its range, and some subnormal."""
    a = saturating_cast(values(m, k, seed=seed, scale=8.0))
    b = saturating_cast(values(n, k, seed=seed + 1, scale=8.0)).t()
    shape_a, shape_b = {
        "tensor": ((1, 1), (1, 1)),
        "row": ((m, 1), (1, n)),
        "1x128": ((m, blocks_of(k)), (blocks_of(k), blocks_of(n))),
        "128x128": ((blocks_of(m), blocks_of(k)), (blocks_of(k), blocks_of(n))),
    }[granularity]
    of_n = None if bias is None else values(n, seed=seed + 4, scale=100.0).to(bias)
    scales = (strided(shape, seed=seed + i) for i, shape in ((2, shape_a), (3, shape_b)))
    scale_result = torch.tensor(3.0 / k**0.5) if out_dtype == E4M3 else None
    return Product(a, b, *scales, of_n, out_dtype, fast, scale_result)


def strided(shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Column-major, every second element; between them is NaN."""
    rows, columns = shape
    held = torch.full((columns, 2 * rows), torch.nan)
    found = held[:, ::2].t()
    return found.copy_(torch.exp2(values(rows, columns, seed=seed)))


def variant(product: Product, block_m: int = 128, block_n: int = 128) -> GemmVariant:
    scales = "block" if product.has_blocks else "outer"
    return GemmVariant(scales, block_m, block_n, product.fast_accum)


def on_kernel(
    monkeypatch: Any, product: Product, kernel: GemmVariant | None = None, *, seed: int = 0
) -> Tensor:
    """The output, with guards around it (`guarded.py`)."""
    m, n, _ = product.sizes
    out = torch.zeros(m, n, dtype=product.out_dtype)
    with device().serving_cpu_tensors(monkeypatch, seed=seed):
        try:
            hopper.launch(variant(product) if kernel is None else kernel, product, out)
        except RuntimeError as error:
            raise AssertionError(f"seed {seed}: {error} {device().last_error()}") from error
    return out


def emulated(product: Product) -> Tensor:
    m, n, _ = product.sizes
    out = torch.zeros(m, n, dtype=product.out_dtype)
    with fp8.study(accumulation="hopper"):
        portable.scaled_mm(product, out)
    return out


def bits(x: Tensor) -> Tensor:
    """An integer for an element; one for all NaNs, and one for both zeros."""
    x = x.float() if x.dtype == E4M3 else x
    words = (x + 0.0).view(_WORDS[x.element_size()]).int()
    return torch.where(x.isnan(), -(2**31), torch.where(x == 0.0, 0, words))


def assert_same(have: Tensor, want: Tensor) -> None:
    differ = bits(have) != bits(want)
    if differ.any():
        row, column = (int(i) for i in differ.nonzero()[0])
        raise AssertionError(
            f"{int(differ.sum())} of {have.numel()} elements differ, the first at ({row}, "
            f"{column}): {have[row, column]} for {want[row, column]}"
        )


def is_caught(run: Callable[[int], Tensor], want: Tensor, seeds: int = 6) -> bool:
    """Whether a schedule tells a wrong kernel: by bits, or by what the simulated device finds."""
    for seed in range(seeds):
        try:
            assert_same(run(seed), want)
        except (AssertionError, _native.DriverError):
            return True
    return False


def changed_kernel(folder: Path, file: str, old: str, new: str) -> _native.Registry:
    """GEMM kernels compiled from sources with an edit, of gemm/ or of what they share with the
    quantizer."""
    shutil.copytree(cutlass_root(), folder / "sources")
    root = folder / "sources" / "gemm"
    folders = (root, root.parent / "quantize")
    path = next(place / file for place in folders if (place / file).is_file())
    text = path.read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new))

    def image(key: str, kind: str) -> bytes:
        unit = variant_of(key).unit()
        changed = Unit(root / unit.source.name, unit.defines, f"changed {key}")
        return compile_unit(changed).ptx.read_bytes() + b"\0"

    return _native.Registry(device().driver, image)


def changed_text(kernel: GemmVariant, pattern: str, new: str) -> bytes:
    """Its PTX with an edit: nothing is compiled."""
    text, count = re.subn(pattern, new, device().ptx(kernel).decode())
    assert count > 0, f"no {pattern!r} in {kernel.name}"
    return text.encode()
