"""`flash8.gemm.quantize_attention` on CPU tensors: O of attention in fp32, quantized by 1x128."""

import math
import random

import pytest
import torch
import torch._dynamo
from torch.library import opcheck

import flash8
import oracle
from cases import cumulative, int32
from flash8 import fp8, gemm
from flash8.call.options import Options

BF16, FP16, FP32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
DTYPES = (BF16, FP16, FP32, E4M3)


def draw(dtype, *lead, heads=4, heads_kv=2, keys=None, head_dim=128, head_dim_v=128, seed=0):
    """q, k and v of shape (*lead, heads, d), of k and v with `keys` rows."""
    g = torch.Generator().manual_seed(seed)
    of_k = lead if keys is None else (*lead[:-1], keys)
    shapes = (
        (*lead, heads, head_dim),
        (*of_k, heads_kv, head_dim),
        (*of_k, heads_kv, head_dim_v),
    )
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def real(data, scale):
    values = data.float().view(*scale.shape, 128)
    return (values * scale[..., None]).view(data.shape)


def assert_close(found, want):
    """want: O in float64, (..., heads, d). Half a step of e4m3, and what P and O are rounded by."""
    data, scale = found
    want = want.reshape(data.shape)
    assert data.dtype == E4M3 and data.is_contiguous()
    assert scale.dtype == FP32 and scale.shape == (data.shape[0], data.shape[1] // 128)
    blocks = want.abs().view(*scale.shape, 128)
    largest = blocks.amax(-1)
    torch.testing.assert_close(
        (scale.double() * 448.0)[largest > 0], largest[largest > 0], rtol=0.06, atol=0
    )
    assert (scale[largest == 0] == 1.0).all()
    error = (real(data, scale) - want).view(*scale.shape, 128).norm(dim=-1)
    assert (error <= 0.09 * blocks.norm(dim=-1)).all()
    stored = data.float().abs().view(*scale.shape, 128).amax(-1)
    assert (stored[largest > 0] == 448.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 130), (129, 129), (30, 5)])
def test_dense(dtype, causal, sizes):
    rows, keys = sizes
    q, k, v = draw(dtype, 2, rows, keys=keys)
    found = gemm.quantize_attention(q, k, v, causal=causal)
    want, _ = oracle.attention(q, k, v, causal=causal)
    assert found[0].shape == (2 * rows, 4 * 128)
    assert_close(found, want)


@pytest.mark.parametrize("dtype", [FP32, E4M3])
@pytest.mark.parametrize("head_dim_v", [128, 256])
def test_it_is_what_quantize_makes_of_attention(dtype, head_dim_v):
    """To the bit where O is not rounded: of fp32, and where one key is seen."""
    q, k, v = draw(dtype, 3, 9, keys=1 if dtype == E4M3 else 20, head_dim_v=head_dim_v)
    found = gemm.quantize_attention(q, k, v)
    if dtype == FP32:
        o = flash8.flash_attn_func(q, k, v)
    else:
        o = v.float().repeat_interleave(2, 2).expand(3, 9, 4, -1)
    want = gemm.quantize(o.reshape(27, -1), "1x128")
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [BF16, E4M3])
def test_output_is_not_rounded_to_16_bits_before(dtype):
    q, k, v = draw(dtype, 2, 40)
    _, scale = gemm.quantize_attention(q, k, v)
    amax = scale.double() * 448.0
    rounded = amax.to(BF16).double()
    assert ((rounded - amax).abs() > 1e-6 * amax).float().mean() > 0.8


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed(dtype):
    """Rows of one more and less than a tile, a prime, empty, and a sequence without keys."""
    lengths, keys = (1, 0, 127, 129, 37, 3), (5, 0, 127, 140, 1, 0)
    q, _, _ = draw(dtype, sum(lengths))
    _, k, v = draw(dtype, sum(keys), seed=1)
    given = {"cu_seqlens_q": cumulative(lengths), "cu_seqlens_k": cumulative(keys)}
    given |= {"seqused_q": int32([max(0, n - 1) for n in lengths])}
    longest = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(keys)}
    data, scale = gemm.quantize_attention(q, k, v, causal=True, **given, **longest)
    o, lse = flash8.flash_attn_varlen_func(
        *(x.double() if dtype != E4M3 else x for x in (q, k, v)),
        given["cu_seqlens_q"],
        given["cu_seqlens_k"],
        *longest.values(),
        seqused_q=given["seqused_q"],
        causal=True,
        return_attn_probs=True,
    )
    assert_close((data, scale), o.double())
    empty = (lse == -math.inf).T
    assert empty.any() and (scale[empty] == 1.0).all()
    assert not data.view(*q.shape[:2], 128)[empty].view(torch.uint8).any()


def test_pages():
    q, k, v = draw(BF16, 3, 10, keys=48)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    used = int32([48, 7, 0])
    pages = [torch.full((9, 16, 2, 128), math.nan).to(BF16) for _ in range(2)]
    for paged, x in zip(pages, (k, v), strict=True):
        paged[order] = x.reshape(9, 16, 2, 128)
    table = order.view(3, 3).int()
    have = gemm.quantize_attention(q, *pages, page_table=table, seqused_k=used, causal=True)
    want = gemm.quantize_attention(q, k, v, seqused_k=used, causal=True)
    for a, b in zip(have, want, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_scaled_tensors_and_means():
    x = draw(BF16, 2, 130)
    q8 = fp8.quantize(x[0], "block", hadamard=True)
    k8 = fp8.quantize(x[1], "block", hadamard=True, smooth_k=True)
    v8 = fp8.quantize(x[2], "block", v_colmajor=True)
    found = gemm.quantize_attention(q8, k8, v8, causal=True)
    o = flash8.flash_attn_func(q8, k8, v8, causal=True)
    assert_close(found, o.double())


OPTIONS = [
    {"window_size": (5, 3)},
    {"softcap": 2.0, "causal": True},
    {"attention_chunk": 16},
    {"alibi_slopes": torch.linspace(0.01, 0.3, 4)},
    {"s_aux": torch.linspace(-1.0, 3.0, 4)},
    {"softmax_scale": 0.3, "pack_gqa": True, "sm_margin": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: next(iter(x)))
def test_options_are_those_of_attention(options):
    q, k, v = draw(FP32, 2, 50)
    found = gemm.quantize_attention(q, k, v, **options)
    want = gemm.quantize(flash8.flash_attn_func(q, k, v, **options).view(100, -1), "1x128")
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_given_scale(shape):
    q, k, v = draw(FP32, 2, 50)
    o = flash8.flash_attn_func(q, k, v).view(100, -1)
    given = torch.full(shape, float(o.abs().max()) / 400.0)  # rounds up to 448, and saturates
    data, scale = gemm.quantize_attention(q, k, v, out_scale=given)
    assert scale.shape == (1, 1) and scale.item() == given.item()
    want = (o * given.reciprocal()).clamp(-448, 448).to(E4M3)
    assert torch.equal(data.view(torch.uint8), want.view(torch.uint8))


def test_nan_stays_where_it_is():
    q, k, v = draw(FP32, 1, 20)
    v[0, 10, 0, 5], v[0, 10, 1, 7] = math.nan, math.inf
    data, scale = gemm.quantize_attention(q, k, v, causal=True)
    o = data.float().view(20, 4, 128)
    assert o[10:, :2, 5].isnan().all() and o.isnan().sum() == 20
    assert (o[10:, 2:, 7] == 448.0).all() and scale.isfinite().all()


def test_no_rows_at_all():
    q, k, v = draw(BF16, 2, 0)
    data, scale = gemm.quantize_attention(q, k, v)
    assert data.shape == (0, 512) and scale.shape == (0, 4)
    q, k, v = draw(BF16, 2, 3, keys=0)
    data, scale = gemm.quantize_attention(q, k, v)
    assert not data.view(torch.uint8).any() and (scale == 1.0).all()


def test_into_the_output_projection():
    """Beside float64 of everything: what two roundings to e4m3 leave."""
    q, k, v = draw(BF16, 2, 60)
    weight = torch.randn(96, 512, generator=torch.Generator().manual_seed(8)) / 22.0
    w8, scale_w = gemm.quantize(weight, "128x128")
    o8, scale_o = gemm.quantize_attention(q, k, v, causal=True)
    y = gemm.scaled_mm(o8, w8.t(), scale_o, scale_w.t())
    o, _ = oracle.attention(q, k, v, causal=True)
    want = o.reshape(120, 512) @ weight.double().T
    assert (y.double() - want).norm() < 0.05 * want.norm()
    static = torch.full((1, 1), float(o.abs().max()) / 448.0)
    o8, scale_o = gemm.quantize_attention(q, k, v, causal=True, out_scale=static)
    w8, scale_w = gemm.quantize(weight, "tensor")
    y = gemm.scaled_mm(o8, w8.t(), scale_o, scale_w)
    assert (y.double() - want).norm() < 0.06 * want.norm()


# ---------------------------------------------------------------------------- torch's machinery


@pytest.mark.parametrize("given", [None, torch.tensor([0.02])])
def test_in_a_traced_function(given):
    q, k, v = draw(BF16, 2, 20)
    w8, scale_w = gemm.quantize(torch.randn(32, 512), "tensor" if given is not None else "128x128")

    def layer(q, k, v):
        o8, scale_o = gemm.quantize_attention(q, k, v, causal=True, out_scale=given)
        return o8, scale_o, gemm.scaled_mm(o8, w8.t(), scale_o, scale_w.t())

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, k, v), layer(q, k, v), strict=True):
        assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize("out_scale", [None, torch.tensor([0.02])])
def test_opcheck(out_scale):
    q, k, v = draw(BF16, 2, 5)
    op = torch.ops.flash8.forward_e4m3.default
    opcheck(
        op, (q, k, v, None, out_scale, *Options()), test_utils=("test_schema", "test_faketensor")
    )


def test_a_fake_call_has_its_shapes():
    q, k, v = (x.to("meta") for x in draw(BF16, 3, 5))
    data, scale = torch.ops.flash8.forward_e4m3(q, k, v, None, None, *Options())
    assert data.shape == (15, 512) and scale.shape == (15, 4)


def test_vmap_is_a_batch():
    q, k, v = draw(BF16, 3, 2, 20)
    data, scale = torch.vmap(lambda *x: gemm.quantize_attention(*x))(q, k, v)
    for i in range(3):
        one = gemm.quantize_attention(q[i], k[i], v[i])
        assert torch.equal(data[i].float(), one[0].float()) and torch.equal(scale[i], one[1])


def test_under_autocast():
    q, k, v = draw(FP32, 1, 20)
    with torch.autocast("cpu", BF16):
        have = gemm.quantize_attention(q, k, v)
    want = gemm.quantize_attention(*(x.to(BF16) for x in (q, k, v)))
    assert torch.equal(have[0].float(), want[0].float()) and torch.equal(have[1], want[1])


def test_it_has_no_derivative():
    q, k, v = draw(BF16, 1, 5)
    with pytest.raises(RuntimeError, match="quantize_attention has no derivative"):
        gemm.quantize_attention(q.requires_grad_(), k, v)
    with torch.no_grad():
        data, _ = gemm.quantize_attention(q, k, v)
    assert not data.requires_grad


# ------------------------------------------------------------------------------------- refusals

Q, K, V = draw(BF16, 1, 5)
REFUSALS = [
    (ValueError, "multiple of 128, .* got 64; quantize O by", {"v": V[..., :64]}),
    (
        ValueError,
        "multiple of 128, .* got 192",
        {"v": torch.cat([V, V], -1)[..., :192]},
    ),
    (TypeError, "out_scale must have dtype torch.float32", {"out_scale": torch.ones(1).double()}),
    (TypeError, "out_scale must be a torch.Tensor, got 0.5", {"out_scale": 0.5}),
    (
        ValueError,
        r"out_scale must have one element, got shape \(2,\)",
        {"out_scale": torch.ones(2)},
    ),
    (ValueError, "out_scale must be positive and finite", {"out_scale": torch.zeros(1)}),
    (ValueError, "out_scale must be positive and finite", {"out_scale": torch.tensor(math.nan)}),
    (TypeError, "k must have dtype", {"k": K.to(FP16)}),
    (ValueError, "softcap must be 0", {"softcap": -1.0}),
    (TypeError, "unexpected keyword argument 'out'", {"out": None}),
]


@pytest.mark.parametrize(("error", "match", "changes"), REFUSALS)
def test_refusals(error, match, changes):
    with pytest.raises(error, match=match):
        gemm.quantize_attention(**{"q": Q, "k": K, "v": V, **changes})


def test_random_calls():
    """Beside float64, with options mixed."""
    rng = random.Random(5)
    for seed in range(12):
        dtype = rng.choice([BF16, FP16, FP32, E4M3])
        heads_kv, ratio = rng.choice([1, 2]), rng.choice([1, 3])
        q, k, v = draw(
            dtype,
            rng.choice([1, 2]),
            rng.choice([1, 17, 70]),
            keys=rng.choice([1, 33, 150]),
            heads=heads_kv * ratio,
            heads_kv=heads_kv,
            head_dim=rng.choice([64, 128, 80]),
            seed=seed,
        )
        options = {"causal": rng.random() < 0.5, "softmax_scale": rng.choice([0.05, 0.1])}
        want, _ = oracle.attention(q, k, v, **options)
        assert_close(gemm.quantize_attention(q, k, v, **options), want)
