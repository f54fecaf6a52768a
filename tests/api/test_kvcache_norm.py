"""RMSNorm of q and of new keys in `flash_attn_with_kvcache`: that of norms which come before it."""

import pytest
import torch

from cases import int32
from flash8 import flash_attn_with_kvcache
from flash8.tensors.rms_norm import Norm, rms_norm

D, EPS = 48, 0.05
E4M3 = torch.float8_e4m3fn


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)

    def tensor(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    q, k, v = (tensor(2, 5, heads, D) for heads in (4, 2, 2))
    return {"q": q, "k_cache": tensor(2, 40, 2, D), "v_cache": tensor(2, 40, 2, D), "k": k, "v": v}


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    both = [1.0 + 0.3 * torch.randn(D, generator=generator).to(dtype) for _ in "qk"]
    return dict(zip(("q_norm_weight", "k_norm_weight"), both, strict=True))


def rotary():
    angles = 0.3 * torch.arange(40)[:, None] * torch.linspace(1.0, 0.1, 8)
    return {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}


def normalised(x, weight):
    """In float64, as torch has it."""
    wide = torch.nn.functional.rms_norm(x.double(), (D,), weight.double(), EPS)
    return wide.to(x.dtype)


LENGTHS = {"cache_seqlens": int32([7, 30]), "causal": True, "return_softmax_lse": True}


@pytest.mark.parametrize("sides", ["q", "k", "qk"])
@pytest.mark.parametrize("turned", [True, False])
def test_norms_before_the_rotation(sides, turned):
    tables = rotary() if turned else {}
    chosen = {f"{x}_norm_weight": weights()[f"{x}_norm_weight"] for x in sides}
    given, plain = inputs(), inputs()
    found = flash_attn_with_kvcache(**given, **LENGTHS, **tables, **chosen, norm_eps=EPS)
    for x in sides:
        plain[x] = normalised(plain[x], chosen[f"{x}_norm_weight"])
    want = flash_attn_with_kvcache(**plain, **LENGTHS, **tables)
    for a, b in zip((*found[:2], given["k_cache"]), (*want[:2], plain["k_cache"]), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)
    assert torch.equal(given["v_cache"], plain["v_cache"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_once(dtype):
    given = inputs(dtype)
    flash_attn_with_kvcache(**given, **LENGTHS, **weights(dtype), norm_eps=EPS)
    want = normalised(inputs(dtype)["k"].float(), weights(dtype)["k_norm_weight"]).to(dtype)
    found = torch.stack([given["k_cache"][0, 7:12], given["k_cache"][1, 30:35]])
    assert (found != want).float().mean() < 1e-2  # fp32 sums may round to the neighbour


def test_a_quantized_cache():
    given = {**inputs(), **{f"{x}_descale": torch.tensor(0.02) for x in "kv"}}
    for name in ("k_cache", "v_cache"):
        given[name] = given[name].to(E4M3)
    flash_attn_with_kvcache(**given, **LENGTHS, **weights(), norm_eps=EPS)
    want = normalised(inputs()["k"], weights()["k_norm_weight"]) / 0.02
    torch.testing.assert_close(given["k_cache"][0, 7:12].float(), want[0], atol=1.0, rtol=0.07)


def test_the_mean_is_of_all_channels_of_any_number():
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    found = rms_norm(x, Norm(torch.ones(20), 0.0))
    torch.testing.assert_close(found.square().mean(-1), torch.ones(3))


REFUSED = {
    "without new keys": (
        {"k": None, "v": None},
        ValueError,
        "q_norm_weight needs k and v to append",
    ),
    "a shape": ({"k_norm_weight": torch.ones(D + 8)}, ValueError, "k_norm_weight must have shape"),
    "a type": ({"q_norm_weight": torch.ones(D).half()}, TypeError, "q_norm_weight must"),
    "eps": ({"norm_eps": -1.0}, ValueError, r"norm_eps must be from 0 to 3\.4e\+38, got -1\.0"),
    "eps beyond fp32": ({"norm_eps": 1e39}, ValueError, "norm_eps must be from 0"),
    "infinite eps": ({"norm_eps": float("inf")}, ValueError, "norm_eps must be finite"),
    "eps of a type": ({"norm_eps": "no"}, TypeError, "norm_eps"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    change, error, words = REFUSED[name]
    given = {**inputs(), **LENGTHS, **weights(), **change}
    before = given["k_cache"].clone()
    with pytest.raises(error, match=words):
        flash_attn_with_kvcache(**given)
    assert torch.equal(given["k_cache"], before)


def test_keys_that_are_e4m3_already_are_refused():
    given = {**inputs(), **LENGTHS, **weights()}
    given |= {x: given[x].to(E4M3) for x in ("k_cache", "v_cache", "k", "v")}
    with pytest.raises(TypeError, match="k_norm_weight needs a k that is not"):
        flash_attn_with_kvcache(**given)


def test_gradients_of_weights_are_refused():
    given = {**inputs(), **LENGTHS, **weights()}
    given["k_norm_weight"].requires_grad_()
    with pytest.raises(ValueError, match="appends k and v in place and has no backward"):
        flash_attn_with_kvcache(**given)
