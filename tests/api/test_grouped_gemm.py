"""`flash8.gemm.grouped_scaled_mm`: scales by shape, torch's names, refusals, traces."""

import pytest
import torch

import flash8
from flash8.call.grouped_scaled_mm import granularity
from gemm_cases import values
from grouped_gemm_cases import GRANULARITIES, make, make_along_k

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn


def call(product, **options):
    a, b, scale_a, scale_b, group_rows, *_ = product
    index = "masked_m" if product.is_apart else "offs"
    given = {index: group_rows, **options}
    return flash8.gemm.grouped_scaled_mm(a, b, scale_a, scale_b, **given)


@pytest.mark.parametrize("room", [None, 9])
@pytest.mark.parametrize("name", GRANULARITIES)
def test_a_group_is_a_product_of_its_own(name, room):
    """As scaled_mm of the group's rows, with its scales."""
    sizes = [5, 0, 9]
    product = make(sizes, 140, 272, name, room=room, beyond=0 if room else 2)
    found = call(product, out_dtype=FP32)
    assert found.shape == product.out_shape
    scale_a, scale_b = product.scales()
    begin = 0
    for group, count in enumerate(sizes):
        rows = slice(begin, begin + count)
        index = (rows,) if room is None else (group, rows)
        want = flash8.gemm.scaled_mm(
            product.a[index], product.b[group], scale_a[group, rows], scale_b[group], out_dtype=FP32
        )
        assert torch.equal(found[index], want)
        begin += count if room is None else 0
    assert room is not None or not found[14:].any()


@pytest.mark.parametrize(
    ("shape_a", "shape_b", "found"),
    [
        ((), (1,), ("tensor", "tensor")),
        ((3, 1, 1), (3, 140), ("group", "row")),
        ((20,), (3, 1, 140), ("row", "row")),
        ((20, 1), (3, 1, 1), ("row", "group")),
        ((20, 3), (3, 3, 2), ("block", "block")),
    ],
)
def test_granularities(shape_a, shape_b, found):
    a, b = torch.empty(20, 272), torch.empty(3, 272, 140)
    assert granularity(a, b, torch.Size(shape_a), torch.Size(shape_b), 3) == found


@pytest.mark.parametrize(
    ("shape", "name"), [((3, 7), "row"), ((3, 7, 1), "row"), ((3, 7, 3), "block")]
)
def test_granularities_of_groups_apart(shape, name):
    a, b = torch.empty(3, 7, 272), torch.empty(3, 272, 140)
    of_b = (3, 140) if name == "row" else (3, 3, 2)
    assert granularity(a, b, torch.Size(shape), torch.Size(of_b), 3)[0] == name


def test_agrees_with_torchs_grouped_product_of_wide_types():
    product = make([4, 16, 12], 32, 160, "tensor")
    a, b = (x.float() for x in (product.a, product.b))
    begin, parts = 0, []
    for group, end in enumerate(product.group_rows.tolist()):
        parts.append(a[begin:end] @ b[group])
        begin = end
    want = torch.cat(parts) * product.scale_a * product.scale_b[0]
    assert torch.allclose(call(product, out_dtype=FP32), want, rtol=1e-4, atol=1e-2)


def test_torchs_names():
    """As torch._scaled_grouped_mm is called: offsets by position, scales of one dimension."""
    product = make([4, 0, 3], 32, 160, "row")
    a, b, scale_a, scale_b, offs, *_ = product
    want = call(product, use_fast_accum=True)
    for given, names in (
        ((a, b, scale_a[:, 0], scale_b, offs), {"out_dtype": BF16}),
        ((a, b, scale_a[:, 0], scale_b), {"offs": offs, "bias": None, "scale_result": None}),
    ):
        found = flash8.gemm.grouped_scaled_mm(*given, use_fast_accum=True, **names)
        assert torch.equal(found, want)
    named = {"mat_a": a, "mat_b": b, "scale_a": scale_a, "scale_b": scale_b, "offs": offs}
    found = flash8.gemm.grouped_scaled_mm(**named, output_dtype=BF16, use_fast_accum=True)
    assert torch.equal(found, want)


def test_offsets_of_64_bits():
    product = make([4, 0, 3], 32, 160)
    wide = product.group_rows.long()
    assert torch.equal(call(product, offs=wide), call(product))
    wide[-1] = 2**40  # beyond the rows
    assert torch.equal(call(product, offs=wide), call(product))


@pytest.mark.parametrize("name", GRANULARITIES)
def test_a_group_of_k_is_a_product_of_its_own(name):
    """As scaled_mm of what it has of K; with scales of blocks where it begins with one."""
    sizes = [128, 0, 256, 48]
    product = make_along_k(sizes, 20, 140, name)
    found, begin = call(product, out_dtype=FP32), 0
    assert found.shape == (4, 20, 140)
    scale_a, scale_b = product.scales()
    for group, count in enumerate(sizes):
        part = slice(begin, begin + count)
        blocks = slice(begin // 128, -(-part.stop // 128)) if name == "block" else slice(None)
        if count:
            want = flash8.gemm.scaled_mm(
                product.a[:, part],
                product.b[part],
                scale_a[group, :, blocks],
                scale_b[group, blocks],
                out_dtype=FP32,
            )
            assert torch.equal(found[group], want)
        else:
            assert not found[group].any()
        begin += count


def test_along_k_as_torch_is_called():
    """Scales of one dimension, groups one after another."""
    product = make_along_k([16, 0, 16], 12, 32, "row", out_dtype=BF16)
    a, b, scale_a, scale_b, offs, *_ = product
    scales = scale_a, scale_b.reshape(-1)
    found = flash8.gemm.grouped_scaled_mm(a, b, *scales, offs, out_dtype=BF16, use_fast_accum=True)
    assert torch.equal(found, call(product, use_fast_accum=True))
    out = torch.full((3, 12, 32), 7.0, dtype=BF16)
    assert call(product, use_fast_accum=True, out=out) is out and torch.equal(out, found)
    assert torch.equal(call(product, offs=offs.long()), call(product))


@pytest.mark.parametrize(("groups", "m", "n", "k"), [(0, 4, 5, 32), (2, 0, 5, 32), (2, 4, 0, 32)])
def test_sizes_of_zero_along_k(groups, m, n, k):
    offs = torch.zeros(groups, dtype=torch.int32)
    for given in ((e4m3(m, k), e4m3(n, k).t()), (e4m3(4, 0), e4m3(5, 0).t())):
        found = flash8.gemm.grouped_scaled_mm(*given, torch.ones(1), torch.ones(1), offs)
        assert found.shape == (groups, given[0].shape[0], given[1].shape[1]) and not found.any()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_out(dtype):
    product = make([4, 0, 3], 32, 160, beyond=1)
    out = torch.full((8, 40), 7.0, dtype=dtype)
    assert call(product, out=out[:, 3:35]).data_ptr() == out[:, 3:35].data_ptr()
    assert torch.equal(out[:, 3:35], call(product, out_dtype=dtype))
    assert (out[:, :3] == 7.0).all() and (out[:, 35:] == 7.0).all()
    apart = make([4, 0], 32, 160, room=5)
    out = torch.full((2, 5, 32), 7.0, dtype=dtype)
    call(apart, out=out)
    assert torch.equal(out[0, :4], call(apart, out_dtype=dtype)[0, :4])
    assert (out[0, 4:] == 7.0).all() and (out[1] == 7.0).all()


def e4m3(*shape):
    return torch.zeros(shape).to(E4M3)


OFFS = torch.tensor([2, 5], dtype=torch.int32)
REFUSALS = [
    (TypeError, "a must have dtype torch.float8_e4m3fn", {"a": torch.ones(5, 32)}),
    (TypeError, "b must have dtype torch.float8_e4m3fn", {"b": torch.ones(2, 32, 6)}),
    (ValueError, "a must have 2 dimensions .* or 3 dimensions", {"a": e4m3(32)}),
    (ValueError, r"b must have 3 dimensions \(G, K, N\) or", {"b": e4m3(32)}),
    (
        ValueError,
        r"b must have 3 dimensions \(G, K, N\) or",
        {"a": e4m3(2, 5, 32), "b": e4m3(6, 32).t()},
    ),
    (ValueError, "b must have as many rows as a has columns, K = 32", {"b": e4m3(2, 6, 48).mT}),
    (ValueError, "must have as many groups", {"a": e4m3(3, 5, 32), "offs": None, "masked_m": OFFS}),
    (
        ValueError,
        "K, the columns of a, must be a multiple of 16, got 24",
        {"a": e4m3(5, 24), "b": e4m3(2, 6, 24).mT},
    ),
    (ValueError, "a must be row-major", {"a": e4m3(32, 5).t()}),
    (ValueError, r"b must be column-major.* pass weights.transpose", {"b": e4m3(2, 32, 6)}),
    (TypeError, "scale_a must be a torch.Tensor", {"scale_a": 1.0}),
    (TypeError, "scale_b must have dtype torch.float32", {"scale_b": torch.ones(2, 6).double()}),
    (ValueError, r"scale_a must have .*; got \(4,\) and \(2, 6\)", {"scale_a": torch.ones(4)}),
    (ValueError, r"scale_a must have .*\(1, 6\)", {"scale_b": torch.ones(1, 6)}),
    (ValueError, "offs goes with .* offs is None, masked_m None", {"offs": None}),
    (ValueError, "offs goes with a of 2 dimensions and masked_m", {"masked_m": OFFS}),
    (ValueError, "offs goes with a of 2", {"a": e4m3(2, 5, 32), "scale_a": torch.ones(2, 5)}),
    (TypeError, "offs must have dtype torch.int32 or torch.int64", {"offs": torch.ones(2)}),
    (
        ValueError,
        r"offs must have shape \(G,\) = \(2,\), got \(3,\)",
        {"offs": torch.ones(3).int()},
    ),
    (TypeError, "out_dtype must be .*, got torch.float8", {"out_dtype": E4M3}),
    (TypeError, "out must have dtype torch.float16", {"out": torch.ones(5, 6), "out_dtype": FP16}),
    (ValueError, r"out must have shape \(M, N\)", {"out": torch.ones(6, 5)}),
    (ValueError, "out must be contiguous in its last", {"out": torch.ones(6, 5).t()}),
    (TypeError, "use_fast_accum must be a bool", {"use_fast_accum": 1}),
    (ValueError, "bias must be None", {"bias": torch.ones(6)}),
    (ValueError, "scale_result must be None", {"scale_result": torch.ones(1)}),
    (TypeError, r"grouped_scaled_mm\(\) got an unexpected keyword .* 'scale_c'", {"scale_c": None}),
    (TypeError, "a and mat_a are one argument", {"mat_a": e4m3(5, 32)}),
]


@pytest.mark.parametrize(("error", "match", "changes"), REFUSALS)
def test_refusals(error, match, changes):
    given = {
        "a": e4m3(5, 32),
        "b": e4m3(2, 6, 32).mT,
        "scale_a": torch.ones(5),
        "scale_b": torch.ones(2, 6),
        "offs": OFFS,
    }
    flash8.gemm.grouped_scaled_mm(**given)
    with pytest.raises(error, match=match):
        flash8.gemm.grouped_scaled_mm(**{**given, **changes})


REFUSALS_ALONG_K = [
    (ValueError, "b must have as many rows as a has columns, K = 32", {"b": e4m3(6, 48).t()}),
    (ValueError, "K, the columns of a, must be a multiple of 16", {"a": e4m3(5, 8)}),
    (ValueError, r"b must be column-major.* pass x.t\(\)", {"b": e4m3(32, 6)}),
    (ValueError, r"scale_a must have .*\(10,\) or \(2, 5, 1\)", {"scale_a": torch.ones(5)}),
    # By 1x128 of both.
    (
        ValueError,
        r"by blocks of 128, \(5, 1\) and \(1, 1\)",
        {"scale_a": torch.ones(5, 1), "scale_b": torch.ones(1, 6)},
    ),
    (ValueError, "offs goes with .* offs is None, masked_m None", {"offs": None}),
    (ValueError, "offs goes with a of 2 dimensions and masked_m", {"masked_m": OFFS}),
    (ValueError, r"offs must have 1 dimensions? \(G,\)", {"offs": OFFS[None]}),
    (ValueError, r"out must have shape \(G, M, N\) = \(2, 5, 6\)", {"out": torch.ones(5, 6)}),
    (
        ValueError,
        "out must be contiguous with masked_m and with groups along K",
        {"out": torch.ones(2, 5, 8)[..., :6]},
    ),
]


@pytest.mark.parametrize(("error", "match", "changes"), REFUSALS_ALONG_K)
def test_refusals_along_k(error, match, changes):
    given = {
        "a": e4m3(5, 32),
        "b": e4m3(6, 32).t(),
        "scale_a": torch.ones(10),
        "scale_b": torch.ones(12),
        "offs": OFFS,
    }
    if "out" in changes:
        given["out_dtype"] = FP32
    flash8.gemm.grouped_scaled_mm(**given)
    if changes.get("a") is not None:
        given["b"] = e4m3(6, 8).t()
    with pytest.raises(error, match=match):
        flash8.gemm.grouped_scaled_mm(**{**given, **changes})


def test_other_refusals():
    product = make([5, 2], 6, 160, room=5)
    with pytest.raises(ValueError, match="out must be contiguous with masked_m"):
        call(product, out=torch.empty(2, 5, 8)[..., :6])
    with pytest.raises(ValueError, match="use_fast_accum must be False with scales of blocks"):
        call(product, use_fast_accum=True)
    with pytest.raises(TypeError, match="missing the argument 'scale_b'"):
        flash8.gemm.grouped_scaled_mm(*product[:3], offs=product.group_rows)


def test_there_is_no_derivative():
    product = make([5, 2], 6, 32, "row")
    needs = product._replace(scale_a=product.scale_a.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="has no derivative"):
        call(needs)
    with torch.no_grad():
        assert not call(needs).isnan().any()


@pytest.mark.parametrize(("sizes", "n", "k"), [([], 5, 32), ([0, 0], 5, 32), ([3, 2], 0, 32)])
@pytest.mark.parametrize("name", GRANULARITIES)
def test_sizes_of_zero(name, sizes, n, k):
    product = make(sizes, n, k, name)
    assert call(product).shape == (sum(sizes), n)


def test_rows_without_any_group_are_zeros():
    none = make([], 5, 32, "tensor")
    assert torch.equal(call(none._replace(a=e4m3(4, 32))), torch.zeros(4, 5, dtype=BF16))


@pytest.mark.parametrize("room", [None, 9, "along K"])
@pytest.mark.parametrize("name", ["row", "block"])
def test_compiles_without_a_break(name, room):
    if room == "along K":
        room, product = None, make_along_k([5, 0, 11], 9, 24, name)
    else:
        product = make([5, 0, 9], 24, 160, name, room=room)
    index = "offs" if room is None else "masked_m"

    def function(out, *tensors, group_rows):
        flash8.gemm.grouped_scaled_mm(*tensors, out=out, **{index: group_rows})
        return out + flash8.gemm.grouped_scaled_mm(*tensors, out=out + 1, **{index: group_rows})

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    outs = [torch.zeros(product.out_shape, dtype=BF16) for _ in range(2)]
    found, want = (
        f(out, *product[:4], group_rows=product.group_rows)
        for f, out in zip((compiled, function), outs, strict=True)
    )
    assert torch.equal(found, want) and torch.equal(*outs)


def test_a_layer_of_experts_compiles():
    """Rows sorted by their expert: the offsets stay in the graph."""
    experts = values(40, seed=1).argsort() % 3
    product = make([14, 13, 13], 24, 160)

    def function(a, b, scale_a, scale_b, experts):
        order = experts.argsort()
        offs = (experts[:, None] == torch.arange(3)).sum(0).cumsum(0)
        rows = a.view(torch.uint8)[order].view(E4M3)
        return flash8.gemm.grouped_scaled_mm(rows, b, scale_a[order], scale_b, offs)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*product[:4], experts), function(*product[:4], experts))


@pytest.mark.parametrize("room", [None, 5, "along K"])
def test_opcheck(room):
    if room == "along K":
        product = make_along_k([5, 2], 6, 7, out_dtype=BF16)
    else:
        product = make([5, 2], 6, 160, room=room, out_dtype=BF16)
    # The other checks of opcheck compare float8 tensors, which torch cannot.
    torch.library.opcheck(
        torch.ops.flash8.grouped_scaled_mm, tuple(product), test_utils="test_faketensor"
    )
