"""What is no descale: refused on CPU tensors by name and place, NaN where nobody can look."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import flash8
from flash8 import fp8
from flash8.backends.hopper.variants import ForwardVariant
from flash8.call import check_descales
from forward_cases import launch
from fp8_forward_cases import dense_call
from simulated_device import missing_compiler

needs_compiler = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

HEAD = ForwardVariant("e4m3", 128, 128, scales="head")
BLOCK = ForwardVariant("e4m3", 128, 128, mask="causal", scales="block")
BAD = [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 1e-40]
SHAPE = (2, 160, 4, 64)  # batch, seqlen, heads, head_dim; two KV heads


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(SHAPE, generator=generator)
    k, v = (torch.randn((2, 160, 2, 64), generator=generator) for _ in range(2))
    return {name: x.to(torch.float8_e4m3fn) for name, x in zip("qkv", (q, k, v), strict=True)}


def descale(shape: tuple[int, ...], place: tuple[int, ...], value: float) -> Tensor:
    x = torch.full(shape, 0.5)
    x[place] = value
    return x


SHAPES = {
    "q_descale": [((), ()), ((2, 4), (1, 3)), ((2, 4, 2), (0, 2, 1))],
    "k_descale": [((), ()), ((2, 2), (1, 0)), ((2, 2, 2), (0, 1, 1))],
    "v_descale": [((), ()), ((2, 2), (1, 0)), ((2, 2, 2), (0, 1, 1))],
    "v_channel_descale": [((2, 64), (1, 33)), ((2, 2, 64), (1, 0, 7))],
}
CASES = [(name, *case) for name, cases in SHAPES.items() for case in cases]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name, shape, place", CASES)
def test_refused_on_cpu_tensors(name, shape, place, value):
    where = rf" at \[{', '.join(map(str, place))}\]" if place else "$"
    with pytest.raises(ValueError, match=rf"{name} must be positive and finite.*{where}"):
        flash8.flash_attn_func(**inputs(), **{name: descale(shape, place, value)})


def test_the_smallest_descale_is_one():
    o = flash8.flash_attn_func(**inputs(), k_descale=torch.tensor(2.0**-126))
    assert o.isfinite().all()


@pytest.mark.parametrize("value", BAD)
def test_refused_in_a_scaled_tensor_and_as_a_quantizers(value):
    q, k, v = (fp8.quantize(x.float(), "head") for x in inputs().values())
    k.descale[1, 1] = value
    with pytest.raises(ValueError, match=r"k_descale must be positive.* at \[1, 1\]"):
        flash8.flash_attn_func(q, k, v)
    with pytest.raises(ValueError, match=r"descale must be positive.* at \[1, 1\]"):
        fp8.quantize(inputs()["k"].float(), "head", descale=k.descale)


def test_refused_before_a_cache_changes():
    given = inputs()
    cache = [given[name].clone() for name in "kv"]
    new = torch.ones(2, 3, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"v_descale must be positive"):
        flash8.flash_attn_with_kvcache(
            new.repeat(1, 1, 2, 1),
            *cache,
            new,
            new,
            cache_seqlens=torch.tensor([5, 9], dtype=torch.int32),
            k_descale=torch.tensor(1.0),
            v_descale=torch.tensor(-1.0),
        )
    for have, name in zip(cache, "kv", strict=True):
        assert torch.equal(have.view(torch.uint8), given[name].view(torch.uint8))


@pytest.mark.parametrize("value", BAD)
def test_nan_where_nobody_has_looked(value, monkeypatch):
    """In the rows that read it and in no other."""
    monkeypatch.setattr(check_descales, "check_values", lambda options: None)
    clean = flash8.flash_attn_func(**inputs(), v_descale=torch.full((2, 2), 0.5))
    o = flash8.flash_attn_func(**inputs(), v_descale=descale((2, 2), (1, 0), value))
    wrong = torch.zeros(o.shape, dtype=torch.bool)
    wrong[1, :, :2] = True
    assert o[wrong].isnan().all() and torch.equal(o[~wrong], clean[~wrong])


def portable(call) -> tuple[Tensor, Tensor]:
    return flash8.flash_attn_func(
        call.q,
        call.k,
        call.v,
        softmax_scale=call.softmax_scale,
        causal=call.causal,
        return_attn_probs=True,
        v_channel_descale=call.v_channel_descale,
        **call.descales,
    )


@needs_compiler
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["q_descale", "k_descale", "v_descale"])
@pytest.mark.parametrize("variant", [HEAD, BLOCK], ids=lambda v: v.name)
def test_kernel(variant, name, value, monkeypatch):
    """Of sequence 1 and head 1 the last block, which the last rows see, or all of it."""
    monkeypatch.setattr(check_descales, "check_values", lambda options: None)
    call = dense_call(variant, 2, 200, 200, 2, 2)
    clean, clean_lse = launch(variant, call)
    wrong = call.descales[name].clone()
    wrong[(1, 1, -1) if wrong.dim() == 3 else (1, 1)] = value
    call = replace(call, descales={**call.descales, name: wrong})
    rows = slice(128, 200) if variant.scales == "block" else slice(0, 200)
    for o, lse in (launch(variant, call), portable(call)):
        assert o[1, rows, 1].isnan().all()
        assert lse[1, 1, rows].isnan().all() == (name != "v_descale")
    o, lse = launch(variant, call)
    o[1, rows, 1], lse[1, 1, rows] = clean[1, rows, 1], clean_lse[1, 1, rows]
    assert torch.equal(o, clean) and torch.equal(lse, clean_lse)


@needs_compiler
@pytest.mark.parametrize("value", BAD)
def test_kernel_by_channel(value, monkeypatch):
    monkeypatch.setattr(check_descales, "check_values", lambda options: None)
    call = dense_call(HEAD, 2, 70, 70, 2, 2, v_channel_descale=torch.full((2, 2, 128), 2.0))
    clean, _ = launch(HEAD, call)
    call.v_channel_descale[1, 0, 77] = value
    o, _ = launch(HEAD, call)
    for found in (o, portable(call)[0]):
        assert found[1, :, 0, 77].isnan().all()
    o[1, :, 0, 77] = clean[1, :, 0, 77]
    assert torch.equal(o, clean)
