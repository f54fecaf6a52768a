"""torch.autocast does to flash8's functions what it does to scaled_dot_product_attention."""

import pytest
import torch
import torch.nn.functional as F

import flash8
from cases import int32

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, 8, 2, 16, generator=g).to(dtype) for _ in range(3)]


def by_torch(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float16])
def test_as_torch_casts(given, wanted):
    q, k, v = inputs(given)
    with torch.autocast("cpu", dtype=wanted):
        out, expected = flash8.flash_attn_func(q, k, v), by_torch(q, k, v)
        assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    cast = [x if given == torch.float64 else x.to(wanted) for x in (q, k, v)]
    assert torch.equal(out, flash8.flash_attn_func(*cast))


def test_what_an_op_is_made_of_is_not_cast():
    """Scores are not rounded: fp64 and bf16 inputs give the bits they give without autocast."""
    for dtype in (torch.float64, torch.bfloat16):
        results = []
        for enabled in (False, True):
            leaves = [x.requires_grad_() for x in inputs(dtype)]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                out = flash8.flash_attn_func(*leaves)
                found = torch.autograd.grad(out.square().sum(), leaves)
                tangent = torch.func.jvp(
                    flash8.flash_attn_func, tuple(leaves), tuple(map(torch.cos, leaves))
                )[1]
            results.append((out, *found, tangent))
        for x, y in zip(*results, strict=True):
            assert torch.equal(x, y)


def test_inputs_of_several_dtypes():
    """q out of a norm in fp32, k and v out of projections in bf16."""
    q, k, v = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash8.flash_attn_func(q, k.bfloat16(), v.bfloat16()).dtype == torch.bfloat16
        assert flash8.flash_attn_func(q, k, v, qv=q).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="k must have dtype"):
        flash8.flash_attn_func(q, k.bfloat16(), v.bfloat16())


def test_gradients_have_the_inputs_dtype():
    leaves = [x.requires_grad_() for x in inputs()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash8.flash_attn_func(*leaves)
    found = torch.autograd.grad(out.float().square().sum(), leaves)
    assert all(x.dtype == torch.float32 and x.abs().max() > 0 for x in found)


ENDS = int32([0, 3, 8])
CALLS = {
    "varlen": lambda q, k, v: flash8.flash_attn_varlen_func(
        *(x[0] for x in (q, k, v)), ENDS, ENDS, 5, 5
    ),
    "qkvpacked": lambda q, k, v: flash8.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2)),
    "kvpacked": lambda q, k, v: flash8.flash_attn_kvpacked_func(q, torch.stack((k, v), 2)),
    "fp8": lambda q, k, v: flash8.fp8.fp8_attention(q, k, v),
    "module": lambda q, k, v: flash8.nn.FlashSelfAttention()(torch.stack((q, k, v), 2)),
    "a cache of the dtype": lambda q, k, v: flash8.flash_attn_with_kvcache(
        q, k.bfloat16(), v.bfloat16()
    ),
    "an append": lambda q, k, v: flash8.flash_attn_with_kvcache(
        q, *torch.zeros(2, 1, 9, 2, 16).bfloat16(), k, v, cache_seqlens=1
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_other_functions(name):
    q, k, v = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = CALLS[name](q, k, v)
    assert torch.equal(out, CALLS[name](*(x.bfloat16() for x in (q, k, v))))
    assert out.dtype == torch.bfloat16


def test_a_cache_is_never_cast():
    q, k, v = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash8.flash_attn_with_kvcache(q, k, v).dtype == torch.float32
        with pytest.raises(TypeError, match="k_cache must have dtype"):
            flash8.flash_attn_with_kvcache(q.bfloat16(), k, v)
        k8, v8 = (x.to(torch.float8_e4m3fn) for x in (k, v))
        assert flash8.flash_attn_with_kvcache(q, k8, v8).dtype == torch.bfloat16
        assert flash8.flash_attn_func(k8, k8, v8).dtype == torch.bfloat16


def test_autocast_of_another_device_changes_nothing():
    q, k, v = inputs()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=True):
        assert flash8.flash_attn_func(q, k, v).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        meta = q.to("meta")
        assert flash8.flash_attn_func(meta, meta, meta).dtype == torch.float32


def test_compiled():
    q, k, v = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(flash8.flash_attn_func, fullgraph=True, backend="eager")
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            assert torch.equal(compiled(q, k, v), flash8.flash_attn_func(q, k, v))
