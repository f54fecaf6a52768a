"""The FP8 forward kernel over paged caches: the bits of a dense cache."""

from dataclasses import replace

import pytest
import torch

from flash8.backends.hopper.variants import ForwardVariant
from forward_cases import compare, int32, launch
from fp8_forward_cases import descales
from paged_cases import check_bits, dense_call, paged
from simulated_device import missing_compiler

pytestmark = [
    pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler())),
    pytest.mark.slow,
]

#: Tiles of 128 keys.
CAUSAL = ForwardVariant("e4m3", 128, 128, mask="causal", scales="head", paged=True)
LOCAL = ForwardVariant("e4m3", 64, 64, mask="local", scales="head", paged=True)
WIDE = ForwardVariant("e4m3", 256, 256, scales="head", paged=True)
#: No key, one, around a tile, and several.
LENGTHS = (0, 1, 127, 128, 129, 460)


def scaled_call(variant, lengths=LENGTHS, **given):
    heads = given.get("heads", 2)
    scales = descales(variant, len(lengths), heads, 1, 1, 1)
    return dense_call(variant, lengths, descales=scales, **given)


@pytest.mark.parametrize("page_size", [8, 16, 64, 112, 128, 224, 528])
def test_pages_give_the_bits_of_a_dense_cache(page_size):
    check_bits(CAUSAL, scaled_call(CAUSAL), page_size)


def test_float64_with_means():
    generator = torch.Generator().manual_seed(3)
    means = {f"{x}_mean": 0.2 * torch.randn(6, 1, 128, generator=generator) for x in "kv"}
    call = scaled_call(CAUSAL, **means)
    compare(call, *launch(CAUSAL, paged(call, 16)))


@pytest.mark.parametrize("variant", [LOCAL, WIDE], ids=lambda v: v.name)
@pytest.mark.parametrize("page_size", [24, 128])
def test_other_tiles(variant, page_size):
    check_bits(variant, scaled_call(variant, (0, 1, 127, 300)), page_size)


@pytest.mark.parametrize("page_size", [24, 128])
def test_left_padding_and_freed_pages(page_size):
    call = scaled_call(LOCAL, (300, 1, 128, 300), indices={"leftpad_k": int32([7, 0, 70, 130])})
    for window in ((70, 0), (-1, 0)):
        given = replace(call, window=window)
        compare(given, *launch(LOCAL, paged(given, page_size)))
