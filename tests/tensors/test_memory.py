"""Whether tensors have bytes in common, against all addresses of their elements."""

import itertools
import random

import torch

from flash8.tensors import memory


def addresses(x):
    steps = ([i * stride for i in range(n)] for n, stride in zip(x.shape, x.stride(), strict=True))
    return {x.storage_offset() + sum(at) for at in itertools.product(*steps)}


def draw(chance, base):
    """Two views of equal strides, and whether each stride is more than what is within it spans."""
    rank = chance.randint(1, 4)
    strides = [chance.randint(1, 40) for _ in range(rank)]
    nested = chance.random() < 0.5
    sizes = [[chance.randint(1, 5) for _ in range(rank)] for _ in range(2)]
    if nested:
        spanned = 1
        for i in range(rank):
            strides[i] = spanned + chance.randint(0, 3)
            spanned = strides[i] * (max(sizes[0][i], sizes[1][i]) - 1) + spanned
    offsets = [chance.randint(0, 150) for _ in range(2)]
    views = (base.as_strided(*x) for x in zip(sizes, [strides] * 2, offsets, strict=True))
    return (*views, nested)


def test_views_of_equal_strides():
    """What is told is so, and where no view overlaps itself it is told."""
    chance, base = random.Random(7), torch.empty(20_000, dtype=torch.uint8)
    counts = {True: 0, False: 0}
    for _ in range(2000):
        a, b, nested = draw(chance, base)
        meet = bool(addresses(a) & addresses(b))
        told = memory.elements_meet(a, b)
        assert told or not meet, (a.shape, b.shape, a.stride())
        assert told == meet or not nested, (a.shape, b.shape, a.stride())
        counts[meet] += nested
    assert min(counts.values()) > 200


def test_no_search_without_an_end():
    """Of tensors that overlap themselves there would be 10^9 sums to try."""
    base = torch.empty(60_000_000, dtype=torch.uint8)
    shape, strides = (100,) * 5, (60, 100, 150, 210, 330)
    a = base.as_strided(shape, strides)
    assert not memory.elements_meet(a, base.as_strided(shape, strides, 5))
    assert memory.elements_meet(a, base.as_strided(shape, strides, 10))
    strides = (100003, 100000, 99991, 99971, 99929)
    a = base.as_strided(shape, strides)
    assert memory.elements_meet(a, base.as_strided(shape, strides, 50021))  # assumed
