"""flash8.nn.Fp8Linear: sizes of nothing, and layers that were cast, replaced or loaded oddly."""

import pytest
import torch
from torch import nn

from flash8.nn import Fp8Linear

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]
BF16, FP32 = torch.bfloat16, torch.float32
E4M3 = torch.float8_e4m3fn
BUFFERS = ("amax_history", "amax", "descale")


def draw(*shape, seed=0, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("grad_dtype", [None, E4M3])
@pytest.mark.parametrize("scaling", ["tensor", "delayed", "block"])
@pytest.mark.parametrize("sizes", [(0, 24), (40, 0)])
def test_no_features(sizes, scaling, grad_dtype):
    """As nn.Linear: the bias alone, or nothing."""
    layer = Fp8Linear(*sizes, scaling=scaling, grad_dtype=grad_dtype)
    x = draw(2, 3, sizes[0]).requires_grad_()
    out = layer(x)
    out.sum().backward()
    want = nn.functional.linear(x, layer.weight, layer.bias)
    assert out.shape == (2, 3, sizes[1]) and torch.equal(out, want)
    assert x.grad.shape == x.shape and not x.grad.any()
    assert layer.weight.grad.shape == layer.weight.shape
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 6.0))


def delayed():
    """A layer with a history that no 16 bits hold."""
    layer = Fp8Linear(48, 32, scaling="delayed", history=3)
    layer(draw(9, 48) * 1.0e6)
    layer.step()
    return layer


@pytest.mark.parametrize("cast", ["bfloat16", "half", "float"])
def test_a_cast_leaves_the_scales(cast):
    layer = delayed()
    kept = {name: x.clone() for name, x in layer.named_buffers()}
    nn.Sequential(layer).to(dtype={"bfloat16": BF16, "half": torch.half, "float": FP32}[cast])
    assert sorted(kept) == sorted(BUFFERS)
    for name, x in layer.named_buffers():
        assert x.dtype == FP32 and torch.equal(x, kept[name]), name
    assert layer.weight.dtype == layer(draw(5, 48, dtype=layer.weight.dtype)).dtype
    layer.step()
    assert layer.descale.dtype == FP32


def test_moves_of_the_scales():
    layer = delayed().bfloat16().to("meta")
    assert {(x.dtype, x.device.type) for x in layer.buffers()} == {(FP32, "meta")}
    layer = layer.half().to_empty(device="cpu")
    assert {(x.dtype, x.device.type) for x in layer.buffers()} == {(FP32, "cpu")}


def test_a_state_of_16_bits_becomes_fp32():
    layer, state = Fp8Linear(48, 32, scaling="delayed", history=3), delayed().state_dict()
    layer.load_state_dict({name: x.bfloat16() for name, x in state.items()}, assign=True)
    assert {x.dtype for x in layer.buffers()} == {FP32} and layer.weight.dtype == BF16
    assert torch.equal(layer.descale, state["descale"].bfloat16().float())


def test_a_state_without_data():
    layer = delayed()
    layer.load_state_dict({x: y.to("meta") for x, y in layer.state_dict().items()}, assign=True)
    assert layer.descale.is_meta
    state = delayed().state_dict()
    layer.load_state_dict(state, assign=True)
    assert layer.descale is state["descale"] and layer(draw(5, 48)).isfinite().all()


REPLACED = {
    "weight of 64 bits": (TypeError, "weight must have dtype", "weight", draw(32, 48).double()),
    "narrower weight": (ValueError, r"weight must have shape .*\(32, 47\)", "weight", draw(32, 47)),
    "fewer rows": (ValueError, r"weight must have shape .*\(31, 48\)", "weight", draw(31, 48)),
    "bias of 64 bits": (TypeError, "bias must have dtype", "bias", draw(32).double()),
    "shorter bias": (ValueError, r"bias must have shape .*\(31,\)", "bias", draw(31)),
    "a bias elsewhere": (ValueError, "bias must be on cpu", "bias", draw(32).to("meta")),
}


@pytest.mark.parametrize("grad_dtype", [None, E4M3])
@pytest.mark.parametrize("name", REPLACED)
def test_replaced_parameters_are_refused(name, grad_dtype, fake, on_fake_driver):
    """nn.Linear refuses them, too; a kernel would read past their ends."""
    error, match, parameter, value = REPLACED[name]
    layer = Fp8Linear(48, 32, grad_dtype=grad_dtype)
    setattr(layer, parameter, nn.Parameter(value))
    with pytest.raises(error, match=match):
        layer(draw(5, 48))
    assert not fake.launches
