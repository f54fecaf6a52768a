"""The grouped GEMM kernel on the simulated device against the emulated tensor core, bit by bit."""

import pytest
import torch

from flash8.backends.hopper import grouped_gemm as hopper
from flash8.backends.hopper.gemm_variants import SHIPPED_GROUPED_GEMMS
from grouped_gemm_cases import GRANULARITIES, assert_same, device, emulated, make, on_kernel
from simulated_device import missing_compiler

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn
SLOW = pytest.mark.slow
SHIPPED = [variant for variant in SHIPPED_GROUPED_GEMMS if variant.grouped]
#: Rows of groups, N and K: ends of tiles and of blocks of K, empty groups first, between and last.
CASES = [
    pytest.param([0, 5, 0, 0, 130, 1, 0], 131, 144, id="empty groups"),
    pytest.param([7], 9, 16, id="one group"),
    pytest.param([1, 1, 1], 1, 272, id="rows"),
    pytest.param([127, 128, 129], 40, 272, marks=SLOW, id="ends of tiles"),
    pytest.param([3, 300, 17], 300, 1168, marks=SLOW, id="more blocks than stages"),
]


def check(monkeypatch, product, kernel=None, *, seed=0):
    want = emulated(product)
    found = on_kernel(monkeypatch, product, kernel, seed=seed)
    assert_same(found, want)
    return found


@pytest.mark.parametrize(("sizes", "n", "k"), CASES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_groups_one_after_another(monkeypatch, granularity, sizes, n, k):
    """What lies beyond the last group is written as zero, whatever its rows hold."""
    found = check(monkeypatch, make(sizes, n, k, granularity, beyond=3))
    assert found[: sum(sizes)].isfinite().all() and not found[sum(sizes) :].any()
    assert device().report()["kernel"] == "flash8_gemm"


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_groups_apart(monkeypatch, granularity):
    """What a group does not use is left alone."""
    product = make([0, 150, 1, 37], 131, 272, granularity, room=150, out_dtype=BF16)
    found = check(monkeypatch, product, seed=1)
    assert found[1].isfinite().all()
    for group, rows in enumerate([0, 150, 1, 37]):
        assert (found[group, rows:].view(torch.int16) == -1).all()


HOSTILE = [
    [50, 20, 60, -5, 2**31 - 1],  # which decrease, and reach beyond the rows
    [-(2**31), -1, 0, 0, 30],
    [2**31 - 1, 5, 2**31 - 1, 0, 70],
    [-1, -2, -3, -4, -5],  # none has a row
    [70, 70, 70, 70, 71],
]


@pytest.mark.parametrize("offsets", HOSTILE)
@pytest.mark.parametrize("granularity", ["row", "block"])
def test_offsets_that_mean_nothing(monkeypatch, granularity, offsets):
    product = make([14, 14, 14, 14, 14], 40, 144, granularity, out_dtype=BF16)
    index = torch.tensor(offsets, dtype=torch.int32)
    found = check(monkeypatch, product._replace(group_rows=index))
    end = max(0, min(70, max(offsets)))
    assert found[:end].isfinite().all() and not found[end:].any()


@pytest.mark.parametrize("granularity", ["row", "block"])
def test_counts_that_mean_nothing(monkeypatch, granularity):
    product = make([9, 9, 9, 9], 40, 144, granularity, room=9)
    index = torch.tensor([-1, 10, 2**31 - 1, -(2**31)], dtype=torch.int32)
    found = check(monkeypatch, product._replace(group_rows=index))
    assert found[0].isnan().all() and found[1:3].isfinite().all() and found[3].isnan().all()


@pytest.mark.parametrize("granularity", ["group", "block"])
def test_more_groups_than_a_warp_has_lanes(monkeypatch, granularity):
    """Rounds of 32 groups: with few rows, with none, and with those of the last ones."""
    sizes = [g % 3 for g in range(32)] + [0] * 40 + [2, 0, 131, 1]
    check(monkeypatch, make(sizes, 140, 144, granularity, beyond=1))


@pytest.mark.parametrize("granularity", ["row", "block"])
def test_rows_of_another_group_do_not_matter(monkeypatch, granularity):
    """A tile reads what follows its group: NaN in rows, scales and B stays with its own."""
    product = make([30, 40, 50], 40, 272, granularity)
    product.a.view(torch.uint8)[30:70] = 0x7F
    product.scale_a[30:70] = torch.nan
    product.b.view(torch.uint8)[1] = 0x7F
    product.scale_b[1] = torch.nan
    found = check(monkeypatch, product)
    assert found[30:70].isnan().all() and found[:30].isfinite().all()
    assert found[70:].isfinite().all()


@pytest.mark.parametrize("n", [48, 41])
@pytest.mark.parametrize("out_dtype", [BF16, FP16, FP32])
def test_rows_of_a_wider_output(monkeypatch, out_dtype, n):
    """Stored by 16 bytes, and by elements. What lies between the rows is left alone."""
    product = make([5, 9], n, 144, "row", beyond=2, out_dtype=out_dtype)
    wide = torch.zeros(16, 64, dtype=out_dtype)
    with device().serving_cpu_tensors(monkeypatch):
        hopper.grouped_scaled_mm(product, wide[:, 8 : 8 + n])
    assert_same(wide[:, 8 : 8 + n], emulated(product))
    assert not wide[:, :8].any() and not wide[:, 8 + n :].any()


@pytest.mark.parametrize("n", [48, 41])
def test_a_stride_of_one_row_means_nothing(monkeypatch, n):
    """torch calls an output contiguous whatever the stride of a dimension of one is."""
    product = make([1, 0, 1], n, 144, "row", room=1, out_dtype=BF16)
    out = torch.zeros(1, 3, n, dtype=BF16).transpose(0, 1)
    assert out.is_contiguous() and out.stride(1) == 3 * n
    with device().serving_cpu_tensors(monkeypatch):
        hopper.grouped_scaled_mm(product, out)
    assert_same(out, emulated(product))


@pytest.mark.parametrize("room", [None, 12])
def test_parts_of_wider_tensors(monkeypatch, room):
    """Groups of B and rows of A that are parts of others, whose rest is NaN; one B for all."""
    product = make([12, 5], 24, 144, room=room)
    a = torch.full((*product.a.shape[:-1], 288), torch.nan).to(E4M3)
    b = torch.full((4, 30, 288), torch.nan).to(E4M3)
    a[..., :144], b[::2, 3:27, 144:] = product.a, product.b.transpose(1, 2)
    part = product._replace(a=a[..., :144], b=b[::2, 3:27, 144:].transpose(1, 2))
    assert_same(check(monkeypatch, part), emulated(product))
    unaligned = torch.zeros(2, 24, 147).to(E4M3)[..., 3:]
    unaligned.view(torch.uint8).copy_(product.b.transpose(1, 2).contiguous().view(torch.uint8))
    assert_same(
        check(monkeypatch, product._replace(b=unaligned.transpose(1, 2))), emulated(product)
    )
    check(monkeypatch, product._replace(b=product.b[:1].expand(2, -1, -1)))


@pytest.mark.parametrize("granularity", ["row", "block"])
def test_a_cta_walks_many_tiles_in_any_order(monkeypatch, granularity):
    """4 to 6 rows of tiles by three columns, on five CTAs."""
    product = make([140, 0, 3, 260], 270, 272, granularity, beyond=7, out_dtype=BF16, seed=7)
    want = emulated(product)
    for seed in range(1, 5):
        assert_same(on_kernel(monkeypatch, product, seed=seed), want)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", SHIPPED, ids=lambda v: v.name)
def test_every_shipped_tile(monkeypatch, kernel):
    granularity = "block" if kernel.scales == "block" else "row"
    for sizes in ([1], [300, 0, 5, 263], [0, 513, 0]):
        product = make(sizes, 263, 656, granularity, out_dtype=BF16, fast=kernel.fast_accum)
        check(monkeypatch, product, kernel, seed=len(sizes))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", SHIPPED, ids=lambda v: v.name)
def test_no_false_alarm_in_100_seeds(monkeypatch, kernel):
    granularity = "block" if kernel.scales == "block" else "group"
    product = make([3, 140, 0, 20], 150, 784, granularity, beyond=4, fast=kernel.fast_accum)
    want = emulated(product)
    for seed in range(100):
        assert_same(on_kernel(monkeypatch, product, kernel, seed=seed), want)
