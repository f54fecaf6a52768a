"""Variants of the GEMM kernels with scales of blocks."""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import gemm_cases
import grouped_gemm_cases
from flash8 import _native
from flash8.backends.hopper.gemm_variants import GemmVariant
from flash8.call.grouped_scaled_mm import GroupedProduct
from flash8.call.scaled_mm import Product

from .runs import Run, image_of, loaded_bytes, text_of


@functools.cache
def products() -> tuple[Product, ...]:
    """Ends of tiles, and tiles in turn; so many blocks of K that a barrier that expects a warp too
    few is a round ahead in the end, and scales that rows share."""
    return (
        gemm_cases.make(20, 30, 16),
        gemm_cases.make(140, 270, 272, bias=torch.bfloat16),
        gemm_cases.make(40, 50, 7184, "128x128", out_dtype=torch.bfloat16),
    )


@functools.cache
def products_of_few_rows(quantizes: bool) -> tuple[Product, ...]:
    """The same for the kernel for few rows, whose ring is deeper: a CTA has four tiles of nine
    blocks, and comes back to the stages of all of them. And one whose K is split."""
    found = (
        gemm_cases.make(9, 30, 16),
        gemm_cases.make(11, 140, 1296)._replace(split_k=8),
        gemm_cases.make(20, 600, 1040, bias=torch.bfloat16),
        gemm_cases.make(11, 40, 11280, "1x128" if quantizes else "128x128"),
    )
    return tuple(_wide(x) for x in found) if quantizes else found


@functools.cache
def products_of_groups() -> tuple[GroupedProduct, ...]:
    """The same for groups of rows: one after another with rows of none behind, apart, and more than
    a warp has lanes."""
    make = grouped_gemm_cases.make
    return (
        make([3, 0, 17], 30, 16, beyond=3),
        make([140, 1, 0, 5], 270, 272, beyond=1),
        make([1] * 33 + [2], 30, 144, room=2, out_dtype=torch.bfloat16),
        make([40], 50, 7184, out_dtype=torch.bfloat16),
    )


@functools.cache
def products_of_groups_along_k() -> tuple[GroupedProduct, ...]:
    """Groups along K: none of it, parts of a stage beside NaN, many stages; tiles in turn."""
    make, poison = grouped_gemm_cases.make_along_k, grouped_gemm_cases.poison
    return (
        poison(make([3, 0, 17, 60], 20, 30), 2),
        make([140, 1, 0, 263], 140, 270),
        make([1] * 33 + [15], 9, 30, out_dtype=torch.bfloat16),
        make([40, 7160], 40, 50, out_dtype=torch.bfloat16),
    )


def _wide(product: Product) -> Product:
    m, _, k = product.sizes
    return product._replace(a=gemm_cases.values(m, k, seed=5).bfloat16(), scale_a=None)


@dataclass(frozen=True)
class Gemm:
    """A variant of a GEMM kernel."""

    name: str
    variant: GemmVariant

    def ptx(self) -> str:
        return text_of(gemm_cases.device().ptx(self.variant))

    def products(self) -> tuple[Product, ...] | tuple[GroupedProduct, ...]:
        if self.variant.grouped_k:
            return products_of_groups_along_k()
        if self.variant.grouped:
            return products_of_groups()
        if self.variant.small_m:
            return products_of_few_rows(self.variant.a != "e4m3")
        return products()

    def cases(self) -> Run:
        wanted = [self._multiply(product, 0) for product in self.products()]
        for product, (out, _) in zip(self.products(), wanted, strict=True):
            assert_same(out, emulated(product))

        def run(ptx: str) -> None:
            registry = _native.Registry(gemm_cases.device().driver, lambda key, kind: image_of(ptx))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(gemm_cases.device(), "_registry", registry)
                for seed in range(6):
                    for product, (want, bytes_) in zip(self.products(), wanted, strict=True):
                        found, loaded = self._multiply(product, seed)
                        assert_same(found, want)
                        assert loaded == bytes_, f"seed {seed}: {loaded} bytes loaded"

        return run

    def _multiply(self, product: Product | GroupedProduct, seed: int) -> tuple[Tensor, int]:
        with pytest.MonkeyPatch.context() as patch:
            if isinstance(product, GroupedProduct):
                out = grouped_gemm_cases.on_kernel(patch, product, self.variant, seed=seed)
            else:
                out = gemm_cases.on_kernel(patch, product, self.variant, seed=seed)
        return out, loaded_bytes(gemm_cases.device())


def emulated(product: Product | GroupedProduct) -> Tensor:
    if isinstance(product, GroupedProduct):
        return grouped_gemm_cases.emulated(product)
    return gemm_cases.emulated(product)


def assert_same(have: Tensor, want: Tensor) -> None:
    gemm_cases.assert_same(have.flatten(0, -2), want.flatten(0, -2))
