"""The portable grouped product against fp64, group by group."""

import pytest
import torch

from flash8.backends.cpu import gemm as one_product
from flash8.backends.cpu import grouped_gemm as portable
from flash8.call.scaled_mm import BLOCK, Product
from grouped_gemm_cases import GRANULARITIES, make, make_along_k, poison
from tolerances import rel_l2

FP32 = torch.float32
SIZES = [0, 5, 0, 130, 1, 0]


def scale_of(scale, group, rows, shape, dims):
    """In fp64, an element for each of a matrix of this shape; `rows` only of A's scales."""
    if scale.numel() == 1:
        return scale.double().reshape(1, 1).expand(shape)
    if tuple(scale.shape[1:]) == (1, 1) and dims == "group":
        return scale[group].double().expand(shape)
    part = scale[rows] if rows is not None else scale[group]
    if dims == "row":
        return (part if rows is not None else part[None]).double().expand(shape)
    wide = part.double().repeat_interleave(BLOCK, 1)
    wide = wide if rows is not None else wide.repeat_interleave(BLOCK, 0)
    return wide[: shape[0], : shape[1]]


def reference(product, dims, group, rows):
    k, n = product.b.shape[1:]
    count = rows.stop - rows.start
    index = (group, rows) if product.is_apart else (rows,)
    of_a = index[0] if len(index) == 1 else index
    a = product.a[index].float().double()
    a = a * scale_of(
        product.scale_a, group, of_a, (count, k) if dims == "block" else (count, 1), dims
    )
    b = product.b[group].float().double()
    b = b * scale_of(product.scale_b, group, None, (k, n) if dims == "block" else (1, n), dims)
    return a @ b


def multiply(product):
    out = torch.full(product.out_shape, torch.nan, dtype=product.out_dtype)
    portable.grouped_scaled_mm(product, out)
    return out


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_groups_one_after_another(granularity):
    product = make(SIZES, 140, 272, granularity, beyond=3)
    found, begin = multiply(product), 0
    for group, count in enumerate(SIZES):
        rows = slice(begin, begin + count)
        if count:
            assert rel_l2(found[rows], reference(product, granularity, group, rows)) < 1e-6
        begin += count
    assert begin == 136 and found.shape == (139, 140) and not found[begin:].any()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_groups_apart(granularity):
    product = make([4, 0, 7], 140, 272, granularity, room=7)
    found = multiply(product)
    for group, count in enumerate([4, 0, 7]):
        rows = slice(0, count)
        if count:
            want = reference(product, granularity, group, rows)
            assert rel_l2(found[group, rows], want) < 1e-6
        assert found[group, count:].isnan().all()


@pytest.mark.parametrize("n", [1, 100, 140])
@pytest.mark.parametrize("k", [16, 128, 144])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_group_is_a_product_of_its_own(granularity, k, n):
    """With its bits, also where the shapes of a group's scales fit two granularities."""
    product = make([1, 2], n, k, granularity)
    scale_a, scale_b = product.scales()
    found, begin = multiply(product), 0
    for group, count in enumerate([1, 2]):
        rows = slice(begin, begin + count)
        scales = scale_a[group, rows], scale_b[group]
        alone = Product(product.a[rows], product.b[group], *scales, None, FP32)
        assert alone.has_blocks == product.has_blocks
        out = torch.empty(count, n)
        one_product.scaled_mm(alone, out)
        assert torch.equal(found[rows], out)
        begin += count


def ranges(group_rows, *, rows=70, apart=False):
    product = make([1] * len(group_rows), 8, 16, room=rows if apart else None)
    if not apart:
        a = product.a[:1].expand(rows, -1)
        product = product._replace(a=a)
    index = torch.tensor(group_rows, dtype=torch.int32)
    found = portable.ranges(product._replace(group_rows=index))
    return [(group, part.start, part.stop) for group, part in found]


def test_offsets_that_mean_nothing_are_clamped():
    assert ranges([50, 20, 60, -5, 2**31 - 1]) == [(0, 0, 50), (2, 50, 60), (4, 60, 70)]
    assert ranges([-1, -2, 0]) == []
    assert ranges([71, 80]) == [(0, 0, 70)]
    assert ranges([3, -1, 71, 2], apart=True) == [(0, 0, 3), (2, 0, 70), (3, 0, 2)]


def wide(product, group, granularity):
    """A and B of a group, scaled, in fp64: the scales of each element are looked up one by one."""
    (m, k), n = product.a.shape, product.b.shape[1]
    a, b = product.a.float().double(), product.b.t().float().double()
    if granularity == "block":
        of_k = torch.arange(k) // BLOCK
        a = a * product.scale_a.double()[:, of_k]
        return a, b * product.scale_b.double().t()[torch.arange(n) // BLOCK][:, of_k]
    of_a, of_b = product.scale_a.double().reshape(-1), product.scale_b.double().reshape(-1)
    if granularity == "row":
        of_a, of_b = of_a[group * m :][:m], of_b[group * n :][:n]
    elif granularity == "group":
        of_a, of_b = of_a[group], of_b[group]
    return a * of_a.reshape(-1, 1), b * of_b.reshape(-1, 1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_groups_along_k(granularity):
    """Also of K that shares a block with another group, whose operands are NaN."""
    sizes = [0, 5, 128, 0, 300, 7]
    product = make_along_k(sizes, 9, 140, granularity)
    found, begin = multiply(poison(product, 4)), 0
    for group, count in enumerate(sizes):
        part = slice(begin, begin + count)
        a, b = wide(product, group, granularity)
        if group == 4:
            assert found[group].isnan().all()
        elif count:
            assert rel_l2(found[group], a[:, part] @ b[:, part].t()) < 1e-6
        else:
            assert not found[group].any()
        begin += count


def test_offsets_of_k_that_mean_nothing_are_clamped():
    product = make_along_k([16] * 5, 3, 4, "tensor")
    index = torch.tensor([50, 20, 60, -5, 2**31 - 1], dtype=torch.int32)
    found = portable.ranges(product._replace(group_rows=index))
    assert [(g, p.start, p.stop) for g, p in found] == [(0, 0, 50), (2, 50, 60), (4, 60, 80)]


def test_products_without_a_sum_are_zero():
    product = make([2, 0, 1], 5, 0, "row")
    assert torch.equal(multiply(product), torch.zeros(3, 5))
