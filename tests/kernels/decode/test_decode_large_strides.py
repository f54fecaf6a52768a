"""Addresses beyond 2^31 elements: the decode kernel over sparse memory, on the simulated device.

Pages, rows or heads of the cache stand so far apart that 32 bits cannot count the elements between
them; only the memory that is touched exists. O and LSE must be those of the same call on contiguous
tensors, to the bit.
"""

import pytest
import torch

from flash8 import flash_attn_with_kvcache
from flash8.backends.hopper import decode
from flash8.ops import decode_plans
from forward_cases import device, int32
from simulated_device import missing_compiler
from sparse_tensors import sparse

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

PAGES, HEADS, DIM = 5, 2, 128
FAR = 2**32 + 4096
FARTHER = 2**33 + 4096  # four pages span more than 2^36 bytes of 16-bit keys
STEP = 2**30 + 256  # between rows


def strides_of(far: str, page_size: int) -> tuple[int, int, int, int]:
    if far == "row":
        return DIM * HEADS, STEP, DIM, 1
    inside = page_size * HEADS * DIM
    if far == "far page":
        return FARTHER, HEADS * DIM, DIM, 1
    return {"page": (FAR, HEADS * DIM, DIM, 1), "head": (inside, HEADS * DIM, FAR, 1)}[far]


def test_a_cache_beyond_2_to_the_36_bytes(monkeypatch):
    """As wide as a tensor that holds all layers' keys. One that is gathered is for the forward
    kernel."""
    assert compare("far page", 16, torch.bfloat16, monkeypatch) == 2
    assert compare("far page", 5, torch.bfloat16, monkeypatch) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("page_size", [16, 5, None], ids=["tma", "gather", "dense"])
@pytest.mark.parametrize("far", ["page", "row", "head"])
def test_addresses_beyond_2_to_the_31_elements(far, page_size, dtype, monkeypatch):
    assert compare(far, page_size, dtype, monkeypatch) == 2


def compare(far, page_size, dtype, monkeypatch):
    """A call on contiguous caches and on those spread out; how many of them the kernel served."""
    generator = torch.Generator().manual_seed(7)
    pages, rows = (2, 16) if page_size is None else (PAGES, page_size)
    shape = (pages, rows, HEADS, DIM)
    caches = [torch.randn(shape, generator=generator).to(dtype) for _ in "kv"]
    q = torch.randn((2, 1, 2 * HEADS, DIM), generator=generator).bfloat16()
    given = {"cache_seqlens": int32([min(rows, 12), 2])}
    if page_size is not None:
        given = {"cache_seqlens": int32([2 * rows - 1, 2])}
        given["page_table"] = int32([4, 0, 3, 1]).view(2, 2)
    strides = strides_of(far, rows)
    offsets = sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    assert offsets > 2**31
    spread = [sparse(shape, strides, dtype) for _ in "kv"]
    for x, values in zip(spread, caches, strict=True):
        x.view(torch.uint8 if dtype.itemsize == 1 else torch.int16).copy_(
            values.view(torch.uint8 if dtype.itemsize == 1 else torch.int16)
        )
    results, launches = [], []
    decode_plans.cache().clear()
    launch = decode.launch
    monkeypatch.setattr(decode, "launch", lambda *args: launches.append(1) or launch(*args))
    for k, v in (caches, spread):
        with device().serving_cpu_tensors(monkeypatch):
            found = flash_attn_with_kvcache(q, k, v, return_softmax_lse=True, **given)
        results.append(found[:2])
    for got, want in zip(*results, strict=True):
        assert not got.isnan().any()
        torch.testing.assert_close(got, want, rtol=0, atol=0.0 if len(launches) == 2 else 1e-2)
    return len(launches)
