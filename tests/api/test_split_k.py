"""`gemm.scaled_mm` with `split_k`: what is added up in which order, and what it depends on."""

import pytest
import torch

from flash8 import fp8, gemm
from flash8.call import split_k
from flash8.call.split_k import chosen, ranges, splits_of
from gemm_cases import GRANULARITIES, make

BF16, FP32 = torch.bfloat16, torch.float32


def multiply(product, **options):
    a, b, scale_a, scale_b, *_ = product
    return gemm.scaled_mm(a, b, scale_a, scale_b, **{"out_dtype": FP32, **options})


def of_range(product, blocks):
    """The product of these blocks of K alone."""
    k = slice(blocks.start * 128, blocks.stop * 128)
    scale_a, scale_b = product.scale_a, product.scale_b
    if product.has_blocks:
        scale_a = scale_a[:, blocks.start : blocks.stop]
        scale_b = scale_b[blocks.start : blocks.stop]
    else:  # they are applied to the sum of all ranges
        scale_a, scale_b = torch.ones_like(scale_a), torch.ones_like(scale_b)
    return multiply(
        product._replace(a=product.a[:, k], b=product.b[k], scale_a=scale_a, scale_b=scale_b)
    )


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("splits", [2, 4, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sums_of_ranges_in_the_order_of_k(granularity, splits, emulated):
    """Of equal ranges and of others: 11 blocks."""
    product = make(9, 40, 1392, granularity)
    with fp8.study(accumulation="hopper" if emulated else "fp32"):
        total = torch.zeros(9, 40)
        for rank in range(splits):
            total = total + of_range(product, range(rank * 11 // splits, (rank + 1) * 11 // splits))
        if not product.has_blocks:
            total = total * (product.scale_a * product.scale_b)
        found = multiply(product, split_k=splits)
        assert torch.equal(found, total)
        if product.has_blocks or not emulated:  # else products of 14 bits, and exact sums
            assert not torch.equal(found, multiply(product))
        bias = torch.arange(40.0).to(BF16)
        assert torch.equal(multiply(product, split_k=splits, bias=bias), total + bias.float())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("splits", [0, 2, 8])
def test_a_row_depends_on_no_other(granularity, splits):
    if granularity == "128x128":
        pytest.skip("rows share scales, not sums")
    product = make(64, 200, 4096, granularity)
    with fp8.study(accumulation="hopper"):
        many = multiply(product, split_k=splits)
        for m in (1, 17):
            scale_a = product.scale_a[: 1 if granularity == "tensor" else m]
            few = product._replace(a=product.a[:m], scale_a=scale_a)
            assert torch.equal(multiply(few, split_k=splits), many[:m])


def test_more_rows_and_fast_accumulation_are_not_split():
    product = make(65, 40, 1392)
    assert torch.equal(multiply(product, split_k=8), multiply(product))
    product = make(9, 40, 4096, "row")
    fast = multiply(product, use_fast_accum=True)
    assert torch.equal(multiply(product, use_fast_accum=True, split_k=0), fast)


def test_the_default_is_no_split():
    product = make(9, 40, 4096)
    assert splits_of(product) == 1 and splits_of(product._replace(split_k=0)) == 8
    assert torch.equal(multiply(product), multiply(product, split_k=1))


@pytest.mark.parametrize(("k", "splits"), [(16, 1), (128, 1), (256, 2), (272, 4), (640, 8), (0, 1)])
def test_no_more_splits_than_blocks(k, splits):
    assert splits_of(make(3, 5, k, "row")._replace(split_k=8)) == splits


@pytest.mark.parametrize(
    ("n", "k", "count", "splits"),
    [
        (512, 7168, 132, 8),
        (1024, 7168, 132, 8),
        (1025, 7168, 132, 4),
        (2048, 7168, 132, 4),
        (2112, 7168, 132, 2),
        (4096, 4096, 132, 2),
        (4160, 4096, 132, 1),
        (2048, 2048, 132, 4),
        (2048, 1152, 132, 2),
        (2048, 512, 132, 1),
        (1024, 7168, 78, 4),
        (1, 16, 132, 1),
    ],
)
def test_how_many_pay(n, k, count, splits):
    assert chosen(n, k, count) == splits


def test_what_is_chosen_follows_from_n_k_and_the_device(monkeypatch):
    found = {splits_of(make(m, 2048, 2048, "row")._replace(split_k=0)) for m in (1, 16, 17, 64)}
    assert found == {4}
    monkeypatch.setattr(split_k, "multiprocessors", lambda device: 78)
    assert splits_of(make(9, 2048, 2048, "row")._replace(split_k=0)) == 2


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("k", [16, 128, 1040, 7168])
def test_ranges_have_every_block_once(k, splits):
    found = [*ranges(k, splits)]
    assert len(found) == splits
    assert [block for blocks in found for block in blocks] == [*range(-(-k // 128))]
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_an_a_that_is_quantized_is_split_alike():
    product = make(9, 140, 1392)
    x = product.a.float().to(BF16)
    a8, scale_a = gemm.quantize(x, "1x128")
    want = multiply(product._replace(a=a8, scale_a=scale_a), split_k=4)
    found = gemm.scaled_mm(x, product.b, scale_b=product.scale_b, split_k=4, out_dtype=FP32)
    assert torch.equal(found, want)


def test_compiles_without_a_break():
    product = make(9, 40, 1392, "row")

    def function(a, b, scale_a, scale_b):
        return gemm.scaled_mm(a, b, scale_a, scale_b, split_k=4) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*product[:4]), function(*product[:4]))


def test_the_op_has_a_default():
    """Of calls of before."""
    product = make(9, 40, 1392, "row")
    found = torch.ops.flash8.scaled_mm(*product[:4], None, None, FP32, False)
    assert torch.equal(found, multiply(product))
    torch.library.opcheck(
        torch.ops.flash8.scaled_mm,
        (*product[:4], None, None, BF16, False, 4),
        test_utils="test_faketensor",
    )
