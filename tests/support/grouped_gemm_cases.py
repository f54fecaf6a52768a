"""Grouped scaled products on the simulated device, and the bits that they must have."""

from typing import Any

import torch
from torch import Tensor

import gemm_cases
from flash8 import fp8
from flash8.backends.cpu import grouped_gemm as portable
from flash8.backends.hopper import grouped_gemm as hopper
from flash8.backends.hopper.gemm_variants import GemmVariant
from flash8.call.grouped_scaled_mm import GroupedProduct
from flash8.call.scaled_mm import blocks_of
from flash8.tensors.float8 import saturating_cast
from gemm_cases import device, values

GRANULARITIES = ("tensor", "group", "row", "block")
_WORDS = {2: torch.int16, 4: torch.int32}


def make(
    sizes: list[int],
    n: int,
    k: int,
    granularity: str = "block",
    *,
    room: int | None = None,
    beyond: int = 0,
    out_dtype: torch.dtype = torch.float32,
    fast: bool = False,
    seed: int = 0,
) -> GroupedProduct:
    """Groups with these rows, one after another and then `beyond` rows of none; with `room` apart,
    each with so many. Rows of no group are NaN, and so are their scales and what lies between."""
    groups = len(sizes)
    shape = (sum(sizes) + beyond,) if room is None else (groups, room)
    a = saturating_cast(values(*shape, k, seed=seed, scale=8.0))
    b = saturating_cast(values(groups, n, k, seed=seed + 1, scale=8.0)).transpose(1, 2)
    shape_a, shape_b = {
        "tensor": ((1,), (1, 1, 1)),
        "group": ((groups, 1, 1), (groups, 1, 1)),
        "row": ((*shape, 1), (groups, n)),
        "block": ((*shape, blocks_of(k)), (groups, blocks_of(k), blocks_of(n))),
    }[granularity]
    scale_a, scale_b = strided(shape_a, seed=seed + 2), strided(shape_b, seed=seed + 3)
    ends = sizes if room is not None else torch.tensor(sizes).cumsum(0).tolist()
    rows = torch.tensor(ends, dtype=torch.int32)
    product = GroupedProduct(a, b, scale_a, scale_b, rows, out_dtype, fast)
    unused = torch.ones(shape, dtype=torch.bool)
    for group, used in portable.ranges(product):
        unused[(used,) if room is None else (group, used)] = False
    a.view(torch.uint8)[unused] = 0x7F
    if granularity in ("row", "block"):
        scale_a[unused] = torch.nan
    return product


def make_along_k(
    sizes: list[int],
    m: int,
    n: int,
    granularity: str = "block",
    *,
    beyond: int | None = None,
    out_dtype: torch.dtype = torch.float32,
    fast: bool = False,
    seed: int = 0,
) -> GroupedProduct:
    """Groups with so much of K, one after another and then `beyond` of none, or as little as fills
    K up to a multiple of 16. K of no group is NaN, and so are scales that no group needs."""
    groups, used = len(sizes), sum(sizes)
    k = used + (-used % 16 if beyond is None else beyond)
    a, b = (
        saturating_cast(values(rows, k, seed=seed + i, scale=8.0)) for i, rows in ((0, m), (1, n))
    )
    shape_a, shape_b = {
        "tensor": ((1,), (1, 1, 1)),
        "group": ((groups, 1, 1), (groups, 1, 1)),
        "row": ((groups * m,), (groups, 1, n)),
        "block": ((m, blocks_of(k)), (blocks_of(k), blocks_of(n))),
    }[granularity]
    scale_a, scale_b = strided(shape_a, seed=seed + 2), strided(shape_b, seed=seed + 3)
    for x in (a, b):
        x.view(torch.uint8)[:, used:] = 0x7F
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    product = GroupedProduct(a, b.t(), scale_a, scale_b, ends, out_dtype, fast)
    if granularity == "block":
        scale_a[:, blocks_of(used) :], scale_b[blocks_of(used) :] = torch.nan, torch.nan
    elif granularity == "row":
        empty = torch.tensor(sizes) == 0
        scale_a.view(groups, m)[empty] = torch.nan
        scale_b[empty] = torch.nan
    return product


def poison(product: GroupedProduct, group: int) -> GroupedProduct:
    """The same, but that a group of K holds NaN in both operands."""
    part = dict(portable.ranges(product))[group]
    a, b = product.a.clone(), product.b.t().clone()
    for x in (a, b):
        x.view(torch.uint8)[:, part] = 0x7F
    return product._replace(a=a, b=b.t())


def strided(shape: tuple[int, ...], *, seed: int) -> Tensor:
    """The last dimension slowest, every second element of rows that are one longer; what lies
    between is NaN."""
    turned = (shape[-1], *shape[:-1])
    held = torch.full((*turned[:-1], turned[-1] + 1, 2), torch.nan)
    return held[..., :-1, 0].movedim(0, -1).copy_(torch.exp2(values(*shape, seed=seed)))


def variant(product: GroupedProduct, block_m: int = 128, block_n: int = 128) -> GemmVariant:
    scales = "block" if product.has_blocks else "outer"
    of_groups = {"grouped_k" if product.is_along_k else "grouped": True}
    return GemmVariant(scales, block_m, block_n, product.fast_accum, **of_groups)


def on_kernel(
    monkeypatch: Any, product: GroupedProduct, kernel: GemmVariant | None = None, *, seed: int = 0
) -> Tensor:
    """The output, with guards around it. What the kernel leaves alone has all bits set: NaN."""
    out = torch.zeros(product.out_shape, dtype=product.out_dtype)
    with device().serving_cpu_tensors(monkeypatch, seed=seed):
        try:
            hopper.launch(variant(product) if kernel is None else kernel, product, out)
        except RuntimeError as error:
            raise AssertionError(f"seed {seed}: {error} {device().last_error()}") from error
    return out


def emulated(product: GroupedProduct) -> Tensor:
    """The same from the emulated tensor core."""
    out = torch.zeros(product.out_shape, dtype=product.out_dtype)
    out.view(_WORDS[out.element_size()]).fill_(-1)
    with fp8.study(accumulation="hopper"):
        portable.grouped_scaled_mm(product, out)
    return out


def assert_same(have: Tensor, want: Tensor) -> None:
    gemm_cases.assert_same(have.flatten(0, -2), want.flatten(0, -2))
