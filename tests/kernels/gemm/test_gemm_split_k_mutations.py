"""The comparisons of test_gemm_split_k.py must catch a kernel that is wrong."""

import pytest

from flash8 import _native
from flash8.backends.hopper.gemm_variants import GemmVariant
from gemm_cases import (
    assert_same,
    changed_kernel,
    changed_text,
    device,
    emulated,
    is_caught,
    make,
    on_kernel,
)
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

BLOCK = GemmVariant("block", 16, 64, small_m=True)

WALK, PRODUCER, SPLIT_K = "small_m_tile_walk.cuh", "small_m_producer.cuh", "small_m_split_k.cuh"
# File, what is replaced, by what, and how many CTAs share K.
FAULTS = {
    "scales of A of the first range": (
        (PRODUCER, " + blocks.begin * params.scale_a.block_stride", ""),
        4,
    ),
    "scales of B of the first range": (
        (PRODUCER, "blocks.begin * params.scale_b.block_stride", "0"),
        4,
    ),
    "a range that leaves out its last block": (
        (
            WALK,
            "(rank + 1) * count / params.splits",
            "(rank + 1) * count / params.splits - rank / 3",
        ),
        4,
    ),
    "a tile for each CTA": (
        (WALK, "(blockIdx.x) / splits_of(params)", "(blockIdx.x)"),
        2,
    ),
    "added from the last to the first": (
        (
            SPLIT_K,
            "int from = 0; from < splits_; ++from",
            "int from = splits_ - 1; from >= 0; --from",
        ),
        4,
    ),
    "one place for all": (
        (SPLIT_K, "(from < owner(part) ? from : from - 1)", "0"),
        4,
    ),
    "both halves in one place": (
        (SPLIT_K, "own = part % (Config::kParts / splits_);", "own = 0;"),
        2,
    ),
    "a part less is waited for": (
        (
            SPLIT_K,
            "parts * (here.splits_ - 1) * kPartBytes",
            "parts * (here.splits_ - 2) * kPartBytes",
        ),
        8,
    ),
    "all rows of a tile by each": (
        (SPLIT_K, "return {rows.begin, min(rows.end, params.m)};", "return {m0, params.m};"),
        8,
    ),
    "rows of the other half": (
        (SPLIT_K, "half == 0 ? -kPartRows : kPartRows", "half == 0 ? kPartRows : -kPartRows"),
        8,
    ),
    "rows beyond the last": (
        (SPLIT_K, "min(rows.end, params.m)", "rows.end"),
        8,
    ),
}


def product_of(splits):
    return make(11, 70, 1168, "1x128")._replace(split_k=splits)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_is_caught(monkeypatch, tmp_path, name):
    edit, splits = FAULTS[name]
    product = product_of(splits)
    want = emulated(product)
    assert_same(on_kernel(monkeypatch, product, BLOCK), want)
    monkeypatch.setenv("FLASH8_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(device(), "_registry", changed_kernel(tmp_path, *edit))
    assert is_caught(lambda seed: on_kernel(monkeypatch, product, BLOCK, seed=seed), want)


#: Of the PTX: nothing is compiled.
EDITS = {
    "sent before the others run": (r"barrier\.cluster\.wait\.acquire;", ""),
    "sums that may still be on their way": (
        r"mbarrier\.try_wait\.parity\.acquire\.cluster\.shared::cta\.b64 done,[^;]*;",
        "setp.eq.s32 done, 0, 0;",
    ),
    "a wait that sees this CTA's stores only": (
        r"try_wait\.parity\.acquire\.cluster\.shared::cta",
        "try_wait.parity.acquire.cta.shared::cta",
    ),
    "sums that are not sent": (r"st\.async[^;]*;", ""),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_caught(monkeypatch, name):
    product = product_of(4)
    text = changed_text(BLOCK, *EDITS[name])
    registry = _native.Registry(device().driver, lambda key, kind: text)
    monkeypatch.setattr(device(), "_registry", registry)
    assert is_caught(
        lambda seed: on_kernel(monkeypatch, product, BLOCK, seed=seed), emulated(product)
    )
