"""`flash8.gemm.scaled_mm`: granularities by shape, torch's names, refusals, traces."""

import pytest
import torch

import flash8
from flash8.call.scaled_mm import granularity
from gemm_cases import GRANULARITIES, make
from tolerances import rel_l2

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn


def arguments(product):
    return product.a, product.b, product.scale_a, product.scale_b


def call(product, **options):
    return flash8.gemm.scaled_mm(*arguments(product), bias=product.bias, **options)


@pytest.mark.parametrize("name", GRANULARITIES)
def test_the_shapes_of_scales_say_their_granularity(name):
    product = make(200, 140, 272, name, out_dtype=BF16, bias=BF16)
    sizes, shapes = product.sizes, (product.scale_a.shape, product.scale_b.shape)
    of_b = "128x128" if name == "1x128" else name
    assert granularity(*sizes, *shapes) == (name, of_b)
    assert call(product).shape == (200, 140)


@pytest.mark.parametrize(
    ("shape_a", "shape_b", "found"),
    [
        ((), (), ("tensor", "tensor")),
        ((1,), (1, 140), ("tensor", "row")),
        ((200, 1), (1, 1), ("row", "tensor")),
        ((200, 3), (3, 2), ("1x128", "128x128")),
        ((2, 3), (3, 2), ("128x128", "128x128")),
    ],
)
def test_granularities(shape_a, shape_b, found):
    assert granularity(200, 140, 272, torch.Size(shape_a), torch.Size(shape_b)) == found


@pytest.mark.parametrize(
    "shapes", [((200, 3), (1, 140)), ((3, 200), (3, 2)), ((200,), (140,)), ((200, 3), (2, 3))]
)
def test_shapes_that_mean_nothing_are_refused(shapes):
    product = make(200, 140, 272, "row")
    scales = [torch.ones(shape) for shape in shapes]
    with pytest.raises(ValueError, match=r"scale_a and scale_b must have .*, got \(.*\) and \("):
        flash8.gemm.scaled_mm(product.a, product.b, *scales)


@pytest.mark.parametrize("name", ["tensor", "row"])
@pytest.mark.parametrize("bias", [None, BF16])
def test_agrees_with_torchs(name, bias):
    product = make(48, 32, 160, name, bias=bias)
    scales = [scale.contiguous() for scale in (product.scale_a, product.scale_b)]
    try:
        want = torch._scaled_mm(product.a, product.b, *scales, bias=product.bias, out_dtype=BF16)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        pytest.skip(f"torch has none here: {error}")
    assert rel_l2(call(product), want) < 5e-3


def test_torchs_names():
    product = make(5, 6, 32, "row", bias=FP16)
    a, b, scale_a, scale_b = arguments(product)
    scales = {"scale_a": scale_a, "scale_b": scale_b, "bias": product.bias}
    want = flash8.gemm.scaled_mm(a, b, scale_a, scale_b, bias=product.bias, out_dtype=FP16)
    for names in (
        {"input": a, "mat2": b, "out_dtype": FP16, "use_fast_accum": False},
        {"mat_a": a, "mat_b": b, "output_dtype": FP16},
        {"a": a, "b": b, "out_dtype": FP16},
    ):
        assert torch.equal(flash8.gemm.scaled_mm(**names, **scales), want)


def test_the_dtype_of_the_output():
    product = make(5, 6, 32, "row")
    assert call(product).dtype == BF16
    for dtype in (BF16, FP16, FP32, E4M3):
        assert call(product, out_dtype=dtype).dtype == dtype
        out = torch.empty(5, 6, dtype=dtype)
        assert call(product, out=out) is out
        assert torch.equal(out.float(), call(product, out_dtype=dtype).float())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_an_e4m3_output_is_multiplied_by_its_scale(shape):
    product = make(5, 6, 32, "row", bias=FP16)
    scale = torch.full(shape, 0.25)
    want = (call(product, out_dtype=FP32) * 0.25).clamp(-448.0, 448.0).to(E4M3)
    found = call(product, out_dtype=E4M3, scale_result=scale)
    out = torch.empty(5, 6, dtype=E4M3)
    assert call(product, out=out, scale_result=scale) is out
    assert torch.equal(found.float(), want.float()) and torch.equal(out.float(), want.float())


def test_out_may_be_a_part_of_a_tensor():
    product = make(5, 6, 32, "row")
    wide = torch.zeros(5, 10)
    call(product, out=wide[:, 2:8])
    assert torch.equal(wide[:, 2:8], call(product, out_dtype=FP32))
    assert not wide[:, :2].any() and not wide[:, 8:].any()


def test_fast_accumulation_is_a_choice():
    product = make(5, 6, 512, "row")
    assert rel_l2(call(product, use_fast_accum=True), call(product)) < 1e-2
    with pytest.raises(ValueError, match="use_fast_accum must be False with scales of blocks"):
        call(make(5, 6, 512), use_fast_accum=True)


def refuse(error, match, **changes):
    given = dict(
        zip(("a", "b", "scale_a", "scale_b"), arguments(make(5, 6, 32, "row")), strict=True)
    )
    with pytest.raises(error, match=match):
        flash8.gemm.scaled_mm(**{**given, **changes})


def e4m3(*shape):
    return torch.zeros(shape).to(E4M3)


REFUSALS = [
    (
        TypeError,
        "a must have dtype torch.float8_e4m3fn, got torch.bf",
        {"a": torch.ones(5, 32).bfloat16()},
    ),
    (
        TypeError,
        "b must have dtype .* got torch.float8_e5m2",
        {"b": torch.ones(32, 6).to(torch.float8_e5m2)},
    ),
    (ValueError, r"a must have 2 dimensions \(M, K\)", {"a": e4m3(1, 5, 32)}),
    (ValueError, "b must have as many rows as a has columns, K = 32", {"b": e4m3(6, 48).t()}),
    (
        ValueError,
        "K, the columns of a, must be a multiple of 16, got 24",
        {"a": e4m3(5, 24), "b": e4m3(6, 24).t()},
    ),
    (ValueError, r"a must be row-major.* strides \(1, 5\)", {"a": e4m3(32, 5).t()}),
    (ValueError, r"b must be column-major.* strides \(6, 1\)", {"b": e4m3(32, 6)}),
    (TypeError, "scale_a must be a torch.Tensor, got 1.0", {"scale_a": 1.0}),
    (TypeError, "scale_b must have dtype torch.float32", {"scale_b": torch.ones(1, 6).double()}),
    (ValueError, r"bias must have shape \(N,\) = \(6,\), got \(5,\)", {"bias": torch.ones(5)}),
    (TypeError, "bias must have dtype", {"bias": torch.ones(6, dtype=torch.int32)}),
    (TypeError, "out_dtype must be .*, got torch.float64", {"out_dtype": torch.float64}),
    (TypeError, "out must have dtype torch.float16", {"out": torch.ones(5, 6), "out_dtype": FP16}),
    (TypeError, "out must have dtype .*, got torch.float64", {"out": torch.ones(5, 6).double()}),
    (ValueError, r"out must have shape \(M, N\)", {"out": torch.ones(6, 5)}),
    (ValueError, "out must be contiguous in its last", {"out": torch.ones(6, 5).t()}),
    (ValueError, "out must not be an expanded", {"out": torch.ones(6).expand(5, 6)}),
    (TypeError, "use_fast_accum must be a bool", {"use_fast_accum": 1}),
    (TypeError, "split_k must be an integer, got True", {"split_k": True}),
    (TypeError, "split_k must be an integer, got 2.0", {"split_k": 2.0}),
    (ValueError, r"split_k must be one of \(1, 2, 4, 8\), or 0.*, got 3", {"split_k": 3}),
    (ValueError, "split_k must be an integer .*, got 16", {"split_k": 16}),
    (ValueError, "split_k must be an integer .*, got -1", {"split_k": -1}),
    (
        ValueError,
        "split_k must be 0 or 1 with use_fast_accum, .*, got 4",
        {"split_k": 4, "use_fast_accum": True},
    ),
    (TypeError, "unexpected keyword argument 'scale_c'", {"scale_c": None}),
    (ValueError, "scale_result goes with .* got torch.bf", {"scale_result": torch.ones(1)}),
    (
        ValueError,
        r"scale_result must have one element, got shape \(2,\)",
        {"scale_result": torch.ones(2), "out_dtype": E4M3},
    ),
    (
        TypeError,
        "scale_result must have dtype torch.float32",
        {"scale_result": torch.ones(1).double(), "out_dtype": E4M3},
    ),
    (TypeError, "a and mat_a are one argument", {"mat_a": e4m3(5, 32)}),
]


@pytest.mark.parametrize(("error", "match", "changes"), REFUSALS)
def test_refusals(error, match, changes):
    refuse(error, match, **changes)


def test_an_argument_that_is_missing():
    with pytest.raises(TypeError, match="missing the argument 'scale_a'"):
        flash8.gemm.scaled_mm(e4m3(5, 32), e4m3(6, 32).t())


@pytest.mark.parametrize("sizes", [(0, 5, 272), (5, 0, 272), (200, 140, 0), (0, 0, 0)])
@pytest.mark.parametrize("name", GRANULARITIES)
def test_sizes_of_zero(name, sizes):
    product = make(*sizes, name, bias=FP32)
    want = product.bias.expand(sizes[:2]) if sizes[2] == 0 else torch.empty(sizes[:2])
    assert torch.equal(call(product, out_dtype=FP32), want)
    out = torch.full(sizes[:2], torch.nan)
    assert torch.equal(call(product, out=out), want)


def test_out_may_not_share_memory():
    product = make(5, 6, 32, "row")
    held = torch.zeros(40)
    held[:5] = product.scale_a[:, 0]
    with pytest.raises(ValueError, match="out must not share memory with an input"):
        flash8.gemm.scaled_mm(
            product.a, product.b, held[:5, None], product.scale_b, out=held[:30].view(5, 6)
        )


def test_there_is_no_derivative():
    product = make(5, 6, 32, "row")
    scale = product.scale_a.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="has no derivative"):
        flash8.gemm.scaled_mm(product.a, product.b, scale, product.scale_b)
    with torch.no_grad():
        assert not flash8.gemm.scaled_mm(product.a, product.b, scale, product.scale_b).isnan().any()


@pytest.mark.parametrize("name", ["row", "1x128"])
def test_compiles_without_a_break(name):
    product = make(40, 24, 160, name, bias=BF16)

    def function(a, b, scale_a, scale_b, bias):
        return flash8.gemm.scaled_mm(a, b, scale_a, scale_b, bias=bias) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    given = (*arguments(product), product.bias)
    assert torch.equal(compiled(*given), function(*given))


@pytest.mark.parametrize("name", ["tensor", "row", "1x128"])
def test_compiles_for_rows_that_data_choose(name):
    """As of the tokens of an expert: a trace does not know how many they are."""
    product = make(40, 24, 160, name)
    chosen = torch.arange(40) % 3 == 0

    def function(a, b, scale_a, scale_b, chosen):
        rows = chosen.nonzero()[:, 0]
        a = a.view(torch.uint8)[rows].view(E4M3)
        scale_a = scale_a if name == "tensor" else scale_a[rows]
        return flash8.gemm.scaled_mm(a, b, scale_a, scale_b)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    given = (*arguments(product), chosen)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert torch.equal(compiled(*given), function(*given))


def test_writes_into_out_in_a_trace():
    product = make(40, 24, 160, "row")

    def function(a, b, scale_a, scale_b, out):
        flash8.gemm.scaled_mm(a, b, scale_a, scale_b, out=out)
        return out + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    out = torch.zeros(40, 24, dtype=BF16)
    found = compiled(*arguments(product), out)
    assert torch.equal(found, out + 1) and torch.equal(out, call(product))


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    product = make(40, 24, 160)
    with FakeTensorMode() as mode:
        given = [mode.from_tensor(x) for x in arguments(product)]
        found = flash8.gemm.scaled_mm(*given, out_dtype=FP16)
    assert found.shape == (40, 24) and found.dtype == FP16


@pytest.mark.parametrize("name", GRANULARITIES)
def test_opcheck(name):
    product = make(20, 24, 160, name, bias=FP32)
    given = (*arguments(product), product.bias, None, BF16, False)
    # The other checks of opcheck compare float8 tensors, which torch cannot.
    torch.library.opcheck(torch.ops.flash8.scaled_mm, given, test_utils="test_faketensor")
