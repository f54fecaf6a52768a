"""Split-K of a scaled product: over how many CTAs the K of a tile is spread, and who has what.

Both backends add up the same partial sums in the same order. How many there are never follows from
the rows of A, so that a row's bits do not depend on the others.
"""

import functools
from collections.abc import Iterator

import torch

from flash8.call.scaled_mm import SPLITS, Product, blocks_of

#: Products of so few rows read B once, and what that takes is their time. They are split.
SMALL_M = 64
_COLUMNS = 64  # of a tile of such a product
#: A cluster lies within a part of the device, a GPC, of 16 or 18 multiprocessors: clusters of 2, 4
#: or 8 fill 16 of them.
_CLUSTERED = 16
#: Of 128 of K, that a CTA has at least: with fewer it reads hardly longer than it exchanges sums.
_LEAST_BLOCKS = 4
_MULTIPROCESSORS = 132  # of an H200


def splits_of(product: Product) -> int:
    """How many partial sums there are: 1 is no split."""
    m, n, k = product.sizes
    if m > SMALL_M or product.fast_accum:
        return 1
    if product.split_k == 0:
        return chosen(n, k, multiprocessors(product.a.device))
    splits = product.split_k
    while splits // 2 >= max(1, blocks_of(k)):  # the same sums: half of them have no block
        splits //= 2
    return splits


@functools.lru_cache(maxsize=4096)
def chosen(n: int, k: int, count: int) -> int:
    """The most splits of N x K whose clusters run on `count` multiprocessors at a time."""
    room = count // _CLUSTERED * _CLUSTERED
    for splits in reversed(SPLITS):
        fits = -(-n // _COLUMNS) * splits <= room and blocks_of(k) >= _LEAST_BLOCKS * splits
        if fits:
            return splits
    return 1


def ranges(k: int, splits: int) -> Iterator[range]:
    """The blocks of 128 of K of each partial sum, in the order in which these are added."""
    count = blocks_of(k)
    for rank in range(splits):
        yield range(rank * count // splits, (rank + 1) * count // splits)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the device, or of an H200 where CPU tensors are served."""
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
