"""flash8.nn.FrozenFp8Linear: products against fp64, other checkpoints, casts, traces."""

import copy

import pytest
import torch
from torch import nn

from flash8 import gemm
from flash8.nn import Fp8Linear, FrozenFp8Linear, to_fp8_linears
from tolerances import rel_l2

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn
SCALINGS = ("tensor", "row", "block")
#: Two matrices of N(0, 1), of which e4m3 rounds each element by 2^-4 of it at most: 0.037 measured.
BOUND = 0.042


def draw(*shape, seed=0, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(inputs=272, outputs=200, bias=True, dtype=FP32):
    """Rows and columns of the weight differ in size by 2^8."""
    layer = nn.Linear(inputs, outputs, bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(draw(outputs, inputs, seed=1) * 0.05)
        if bias:
            layer.bias.copy_(draw(outputs, seed=2))
    return layer


def call(layer, x):
    with torch.no_grad():
        return layer(x)


def exact(layer, x):
    """In fp64, of the weight that the layer has, and of x as it is."""
    rows, columns = layer.weight.shape
    scale = layer.weight_scale.double()
    if layer.scaling == "block":
        scale = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    out = x.double() @ (layer.weight.double() * scale).t()
    return out if layer.bias is None else out + layer.bias.double()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_product(scaling, dtype):
    given = linear(dtype=dtype)
    layer = FrozenFp8Linear.from_linear(given, scaling=scaling)
    x = draw(3, 5, 272, dtype=dtype)
    out = call(layer, x)
    assert out.dtype == dtype and out.shape == (3, 5, 200)
    assert rel_l2(out, exact(layer, x)) < BOUND
    assert layer.weight.dtype == E4M3 and layer.bias.data_ptr() == given.bias.data_ptr()
    assert not list(layer.parameters())
    assert rel_l2(out, call(given.double(), x.double())) < 1.5 * BOUND


@pytest.mark.parametrize("rows", [1, 64, 65])
def test_the_bits_of_the_product_of_what_is_quantized(rows):
    layer = FrozenFp8Linear.from_linear(linear(dtype=BF16))
    x = draw(rows, 272, dtype=BF16)
    x8, scale = gemm.quantize(x, "1x128")
    given = scale, layer.weight_scale.t()
    want = gemm.scaled_mm(x8, layer.weight.t(), *given, bias=layer.bias, out_dtype=BF16)
    assert torch.equal(call(layer, x), want)
    assert torch.equal(call(layer, (x8, scale)), want)
    leading = x8.view(1, rows, 272), scale.view(1, rows, 3)
    assert torch.equal(call(layer, leading), want[None])


@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_quantizers_give(scaling):
    layer = FrozenFp8Linear.from_linear(linear(dtype=FP16), scaling=scaling)
    x, norm = draw(7, 272, dtype=FP16), torch.ones(272, dtype=FP16)
    granularity = "1x128" if scaling == "block" else "row"
    x8, scale = gemm.quantize_rms_norm(x, norm, eps=1e-6, granularity=granularity)
    out = call(layer, (x8, scale))
    normed = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert out.dtype == FP16 and rel_l2(out, exact(layer, normed)) < BOUND
    if scaling != "block":
        x8, scale = gemm.quantize(x, "tensor")
        assert rel_l2(call(layer, (x8, scale)), exact(layer, x)) < BOUND


def test_a_checkpoint_with_scales_by_another_name():
    """DeepSeek-V3's: blocks of 128 x 128, and no bias."""
    source = FrozenFp8Linear.from_linear(linear(bias=False, dtype=BF16))
    state = source.state_dict()
    state["weight_scale_inv"] = state.pop("weight_scale")
    model = nn.Sequential(FrozenFp8Linear(272, 200, bias=False, device="meta"))
    model.load_state_dict({f"0.{name}": x for name, x in state.items()}, assign=True)
    x = draw(4, 272, dtype=BF16)
    assert torch.equal(call(model, x), call(source, x))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_checkpoint_that_is_not_quantized(scaling):
    source = linear(dtype=BF16)
    layer = FrozenFp8Linear(272, 200, scaling=scaling)
    layer.load_state_dict(source.state_dict())
    x = draw(4, 272, dtype=BF16)
    assert torch.equal(
        call(layer, x), call(FrozenFp8Linear.from_linear(source, scaling=scaling), x)
    )


def test_a_scale_without_dimensions():
    source = FrozenFp8Linear.from_linear(linear(dtype=BF16), scaling="tensor")
    state = source.state_dict()
    state["weight_scale"] = state["weight_scale"].reshape(())
    layer = FrozenFp8Linear(272, 200, scaling="tensor")
    layer.load_state_dict(state)
    x = draw(4, 272, dtype=BF16)
    assert torch.equal(call(layer, x), call(source, x))


def test_its_own_state_and_copies():
    layer = FrozenFp8Linear.from_linear(linear(dtype=BF16))
    other = FrozenFp8Linear(272, 200)
    other.load_state_dict(layer.state_dict())
    x = draw(4, 272, dtype=BF16)
    for made in (other, copy.deepcopy(layer)):
        assert torch.equal(call(made, x), call(layer, x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_casts_leave_the_weight_alone(dtype, bias):
    layer = FrozenFp8Linear.from_linear(linear(bias=bias, dtype=BF16))
    weight, scale = layer.weight.clone(), layer.weight_scale.clone()
    layer = nn.Sequential(layer).to(dtype)[0]
    assert torch.equal(layer.weight.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(layer.weight_scale, scale) and layer.dtype == dtype
    x = draw(4, 272, dtype=dtype)
    assert call(layer, x).dtype == dtype
    assert call(layer, gemm.quantize(x, "1x128")).dtype == dtype


def test_layers_of_a_model():
    """Trained ones as well; a layer that is shared stays shared, and others stay what they are."""
    shared = linear(64, 64, dtype=BF16)
    trained = Fp8Linear.from_linear(linear(64, 32, dtype=BF16), scaling="delayed")
    head = linear(32, 8, dtype=BF16)
    model = nn.Sequential(shared, nn.GELU(), shared, trained, head)
    to_fp8_linears(model, lambda name, _: name != "4", frozen=True, scaling="row")
    assert model[0] is model[2] and isinstance(model[0], FrozenFp8Linear)
    assert isinstance(model[3], FrozenFp8Linear) and model[3].scaling == "row"
    assert model[4] is head
    assert call(model, draw(3, 64, dtype=BF16)).shape == (3, 8)
    assert isinstance(to_fp8_linears(linear(), frozen=True), FrozenFp8Linear)


def test_compiled_whole():
    layer = FrozenFp8Linear.from_linear(linear(dtype=BF16))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for rows in (3, 70):
        x = draw(rows, 272, dtype=BF16)
        assert torch.equal(call(compiled, x), call(layer, x))


def test_autocast_casts_x():
    layer = FrozenFp8Linear.from_linear(linear(dtype=BF16))
    x = draw(4, 272)
    with torch.autocast("cpu", BF16):
        assert torch.equal(call(layer, x), call(layer, x.to(BF16)))


def test_no_rows():
    layer = FrozenFp8Linear.from_linear(linear(dtype=BF16))
    assert call(layer, draw(2, 0, 272, dtype=BF16)).shape == (2, 0, 200)


def test_it_has_no_gradients():
    layer = FrozenFp8Linear.from_linear(linear(dtype=BF16))
    x = draw(4, 272, dtype=BF16).requires_grad_()
    with pytest.raises(RuntimeError, match=r"no derivative.*Fp8Linear"):
        layer(x)
    assert not call(layer, x).requires_grad


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("in_features must be a multiple of 16, got 40", {"in_features": 40}),
        ("out_features must be .* got 0", {"out_features": 0}),
        ("scaling must be one of .* got 'delayed'", {"scaling": "delayed"}),
        ("dtype must be one of", {"dtype": torch.float64}),
    ],
)
def test_what_it_is_made_of(reason, options):
    with pytest.raises((TypeError, ValueError), match=reason):
        FrozenFp8Linear(**{"in_features": 32, "out_features": 8} | options)


def wrong_inputs():
    x = draw(4, 272, dtype=BF16)
    x8, scale = gemm.quantize(x, "1x128")
    return {
        r"x must have shape \(\.\.\., in_features\)": x[:, :256],
        "x must have dtype .*float8_e4m3fn, got .*bfloat16": (x, scale),
        "x must have dtype .*bfloat16.* got .*float8": x8,
        "x's scale must have dtype torch.float32": (x8, scale.double()),
        "scale_a and scale_b must have": (x8, scale[:, :2]),
    }


@pytest.mark.parametrize("reason", wrong_inputs())
def test_wrong_inputs(reason):
    layer = FrozenFp8Linear.from_linear(linear(dtype=BF16))
    with pytest.raises((TypeError, ValueError), match=reason):
        call(layer, wrong_inputs()[reason])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", torch.zeros(200, 272)),
        ("weight", torch.zeros(200, 256).to(E4M3)),
        ("weight_scale", torch.ones(2, 2)),
        ("weight_scale", torch.ones(2, 3, dtype=BF16)),
    ],
)
def test_buffers_that_have_been_replaced(name, value):
    layer = FrozenFp8Linear.from_linear(linear(dtype=BF16))
    setattr(layer, name, value)
    with pytest.raises((TypeError, ValueError), match=f"{name} must"):
        call(layer, draw(4, 272, dtype=BF16))
