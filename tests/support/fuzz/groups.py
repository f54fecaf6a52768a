"""The leg of grouped products on the simulated device, with indices that only it sees.

Whatever they hold, the output is bit by bit that of the emulated tensor core, where they are
clamped as the kernel has to. Data and scales are drawn anew for each call, NaN among them.
"""

import random
from typing import Any

import pytest
import torch

from fuzz.device import HOSTILE, missing
from grouped_gemm_cases import assert_same, emulated, make, make_along_k, on_kernel

__all__ = ["call", "missing"]
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Numbers around the ends of 128 of K or rows, and anything.
_NEAR = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130, 255, 256, 257]


def call(seed: int) -> str:
    """A launch with hostile indices, and one with sensible ones."""
    rng = random.Random(f"groups {seed}")
    for is_hostile in (True, False):
        product = draw(rng)
        if is_hostile:
            product = product._replace(group_rows=spoilt(rng, product.group_rows))
        with pytest.MonkeyPatch.context() as patch:
            found = on_kernel(patch, product, seed=rng.randrange(1000))
        try:
            assert_same(found, emulated(product))
        except AssertionError as error:
            shapes = tuple(product.a.shape), tuple(product.b.shape)
            raise AssertionError(f"{error}; {shapes}, {product.group_rows.tolist()}") from error
    return "hostile launched"


def draw(rng: random.Random) -> Any:
    """A product of groups that fill up what there is, or do not."""
    sizes = [rng.choice(_NEAR) for _ in range(rng.choice([1, 3, 5]))]
    if rng.random() < 0.2:
        sizes = [rng.choice([0, 0, 1, 2]) for _ in range(rng.choice([31, 33, 70]))]
    granularity = rng.choice(["tensor", "group", "row", "block"])
    options: dict[str, Any] = {"out_dtype": rng.choice(_TYPES), "seed": rng.randrange(1000)}
    n = rng.choice([1, 8, 41, 130])
    if rng.random() < 0.6:
        sizes = sizes if sum(sizes) else [*sizes, 5]
        return make_along_k(sizes, rng.choice([1, 9, 131]), n, granularity, **options)
    if rng.random() < 0.5:
        options["room"] = max(1, *sizes)
    else:
        options["beyond"] = rng.choice([1, 9])
    return make(sizes, n, rng.choice([16, 144, 400]), granularity, **options)


def spoilt(rng: random.Random, group_rows: torch.Tensor) -> torch.Tensor:
    """The indices with some others in their place."""
    found = group_rows.clone()
    for _ in range(rng.choice([1, 2, 5])):
        at = rng.randrange(found.numel())
        found[at] = rng.choice(HOSTILE) if rng.random() < 0.6 else rng.randint(-300, 600)
    return found.flip(0) if rng.random() < 0.2 else found
