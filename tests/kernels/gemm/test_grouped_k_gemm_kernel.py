"""The GEMM kernel with groups along K, for gradients of the weights of experts, on the simulated
device against the emulated tensor core, bit by bit."""

import pytest
import torch

from flash8.backends.hopper.gemm_variants import SHIPPED_GROUPED_GEMMS
from grouped_gemm_cases import (
    GRANULARITIES,
    assert_same,
    device,
    emulated,
    make_along_k,
    on_kernel,
    poison,
)
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SLOW = pytest.mark.slow
SHIPPED = [variant for variant in SHIPPED_GROUPED_GEMMS if variant.grouped_k]
#: K of groups, M and N: ends of tiles and of stages, several groups in one, empty ones, more than
#: the ring of stages holds.
CASES = [
    pytest.param([0, 5, 0, 123, 130, 1, 0], 131, 140, id="empty groups"),
    pytest.param([7], 9, 9, id="one group"),
    pytest.param([1, 1, 1], 1, 3, id="one of K"),
    pytest.param([127, 128, 129, 16], 40, 140, marks=SLOW, id="ends of stages"),
    pytest.param([3, 1300, 17], 140, 300, marks=SLOW, id="more blocks than stages"),
]


def check(monkeypatch, product, kernel=None, *, seed=0):
    want = emulated(product)
    found = on_kernel(monkeypatch, product, kernel, seed=seed)
    assert_same(found, want)
    return found


@pytest.mark.parametrize(("sizes", "m", "n"), CASES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_groups_along_k(monkeypatch, granularity, sizes, m, n):
    """A group without K is zeros, whatever its scales hold."""
    found = check(monkeypatch, make_along_k(sizes, m, n, granularity))
    assert found.isfinite().all()
    for group, size in enumerate(sizes):
        assert bool(found[group].any()) == (size > 0)
    assert device().report()["kernel"] == "flash8_gemm"


@pytest.mark.parametrize("granularity", ["group", "block"])
@pytest.mark.parametrize("group", [0, 2, 3])
def test_nan_of_a_group_stays_with_it(monkeypatch, granularity, group):
    """Groups share stages of K: in front, behind, and on both sides of one."""
    product = poison(make_along_k([30, 0, 10, 100, 21, 140], 40, 40, granularity), group)
    found = check(monkeypatch, product, seed=group)
    for other in range(6):
        assert found[other].isnan().all() if other == group else found[other].isfinite().all()


HOSTILE = [
    [50, 20, 60, -5, 2**31 - 1],  # which decrease, and reach beyond K
    [-(2**31), -1, 0, 0, 30],
    [2**31 - 1, 5, 2**31 - 1, 0, 70],
    [-1, -2, -3, -4, -5],  # none has any K
]


@pytest.mark.parametrize("offsets", HOSTILE)
@pytest.mark.parametrize("granularity", ["row", "block"])
def test_offsets_that_mean_nothing(monkeypatch, granularity, offsets):
    product = make_along_k([60, 60, 60, 60, 64], 20, 40, granularity, out_dtype=BF16)
    index = torch.tensor(offsets, dtype=torch.int32)
    assert check(monkeypatch, product._replace(group_rows=index)).isfinite().all()


@pytest.mark.parametrize("granularity", ["group", "block"])
def test_more_groups_than_a_warp_has_lanes(monkeypatch, granularity):
    """Rounds of 32 groups: with little of K, with none, and with that of the last ones."""
    sizes = [g % 3 for g in range(32)] + [0] * 40 + [2, 0, 131, 1]
    check(monkeypatch, make_along_k(sizes, 20, 30, granularity, beyond=160 - sum(sizes) % 16))


@pytest.mark.parametrize("n", [48, 41])
@pytest.mark.parametrize("out_dtype", [BF16, FP16, FP32])
def test_types_of_the_output(monkeypatch, out_dtype, n):
    """Stored by 16 bytes, and by elements."""
    check(monkeypatch, make_along_k([5, 0, 11], 9, n, "row", out_dtype=out_dtype))


def test_parts_of_wider_tensors(monkeypatch):
    """K from anywhere in others, whose rest is NaN."""
    product = make_along_k([12, 50, 2], 24, 20)
    wide = torch.full((24, 320), torch.nan).to(torch.float8_e4m3fn)
    other = torch.full((20, 320), torch.nan).to(torch.float8_e4m3fn)
    for first in (16, 3):  # as it lies, and copied
        part = slice(first, first + 64)
        wide[:, part], other[:, part] = product.a, product.b.t()
        found = check(monkeypatch, product._replace(a=wide[:, part], b=other[:, part].t()))
        assert found.isfinite().all()


@pytest.mark.parametrize("granularity", ["row", "block"])
def test_a_cta_walks_many_tiles_in_any_order(monkeypatch, granularity):
    """Two rows of tiles by three columns in each group, on five CTAs."""
    product = make_along_k([140, 0, 3, 260], 140, 270, granularity, out_dtype=BF16, seed=7)
    want = emulated(product)
    for seed in range(1, 5):
        assert_same(on_kernel(monkeypatch, product, seed=seed), want)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", SHIPPED, ids=lambda v: v.name)
def test_every_shipped_tile(monkeypatch, kernel):
    granularity = "block" if kernel.scales == "block" else "row"
    for sizes in ([1], [300, 0, 5, 263], [0, 513, 0]):
        product = make_along_k(sizes, 150, 263, granularity, out_dtype=BF16, fast=kernel.fast_accum)
        check(monkeypatch, product, kernel, seed=len(sizes))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", SHIPPED, ids=lambda v: v.name)
def test_no_false_alarm_in_100_seeds(monkeypatch, kernel):
    granularity = "block" if kernel.scales == "block" else "group"
    sizes = [3, 140, 0, 20, 700]
    product = make_along_k(sizes, 150, 140, granularity, beyond=1, fast=kernel.fast_accum)
    want = emulated(product)
    for seed in range(100):
        assert_same(on_kernel(monkeypatch, product, kernel, seed=seed), want)
