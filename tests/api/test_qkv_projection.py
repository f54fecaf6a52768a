"""`flash8.gemm.qkv_projection`: what it equals, what attention makes of it, refusals, traces."""

import pytest
import torch

import flash8
import oracle
from cases import cumulative, int32
from flash8 import fp8, gemm
from gemm_cases import values
from qkv_cases import make
from quantizer_cases import assert_equal
from tolerances import FP8_REL_L2, rel_l2

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn


def call(p, **options):
    cos, sin, offsets, interleaved = p.rope or (None, None, None, True)
    norms = {}
    for side, norm in (("q", p.q_norm), ("k", p.k_norm)):
        if norm is not None:
            norms |= {f"{side}_norm_weight": norm.weight, "norm_eps": norm.eps}
    given = {
        "heads_q": p.heads_q,
        "heads_kv": p.heads_kv,
        "bias": p.bias,
        "rotary_cos": cos,
        "rotary_sin": sin,
        "rotary_seqlens": offsets,
        "rotary_interleaved": interleaved,
        "cu_seqlens": p.cu_seqlens,
        "seqused": p.seqused,
        **norms,
        **options,
    }
    return gemm.qkv_projection(p.a, p.b, p.scale_a, p.scale_b, **given)


PLACES = {
    "dense": ((2, 150), {}),
    "used": ((2, 150), {"seqused": [150, 31]}),
    "packed": ((277,), {"cu_seqlens": [0, 0, 130, 131, 131, 270]}),
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rope", [None, "halves", "interleaved"])
@pytest.mark.parametrize("place", PLACES)
def test_it_is_the_product_and_the_quantizer(place, rope, head_dim):
    tokens, where = PLACES[place]
    dim = {"head_dim": head_dim, "rotary_dim": min(head_dim, 96)}
    p = make(tokens, 144, (4, 2), rope=rope, bias=BF16, offsets=None, **dim, **where)
    found = call(p)
    x = gemm.scaled_mm(*p.product[:4], bias=p.bias, out_dtype=FP32)
    x = x.view(*tokens, 8, head_dim)
    given = {"cu_seqlens": p.cu_seqlens, "seqused": p.seqused}
    for y, have, options in zip(
        x.split((4, 2, 2), dim=-2),
        found,
        ({"rope": p.rope}, {"rope": p.rope}, {"v_colmajor": True}),
        strict=True,
    ):
        assert_equal(have, fp8.quantize(y, "block", **given, **options))
    assert all((x.cu_seqlens is None) == (p.cu_seqlens is None) for x in found)


def wanted(p):
    """q, k and v in float64."""
    _, n, k = p.product.sizes
    scale_a = p.scale_a.double().repeat_interleave(128, 1)[:, :k]
    scale_b = p.scale_b.double().repeat_interleave(128, 0)[:k].repeat_interleave(128, 1)[:, :n]
    x = (p.rows.double() * scale_a) @ (p.b.double() * scale_b)
    x = (x if p.bias is None else x + p.bias.double()).view(*p.a.shape[:-1], -1, 128)
    q, k, v = x.split((p.heads_q, p.heads_kv, p.heads_kv), dim=-2)
    found = []
    for y, norm in ((q, p.q_norm), (k, p.k_norm)):
        if norm is not None:
            mean = y.pow(2).mean(-1, keepdim=True)
            y = y / (mean + norm.eps).sqrt() * norm.weight.double()
        if p.rope is not None:
            cos, sin, offsets, interleaved = p.rope
            starts, steps = offsets.tolist(), torch.arange(y.shape[1])
            turned = [
                oracle.rotate(x, cos, sin, start + steps, interleaved)
                for x, start in zip(y, starts, strict=True)
            ]
            y = torch.stack(turned)
        found.append(y)
    return [*found, v]


@pytest.mark.parametrize("rope", [None, "halves", "interleaved"])
@pytest.mark.parametrize("norms", [False, True])
def test_against_float64(norms, rope):
    """What it stands for, and attention of it."""
    offsets = None if rope is None else [5, 0]
    p = make((2, 140), 400, (4, 2), rope=rope, norms=norms, bias=FP16, offsets=offsets)
    found, want = call(p), wanted(p)
    for have, y in zip(found, want, strict=True):
        assert rel_l2(fp8.dequantize(have), y) < 0.04
    q, k, v = found
    q, k, v = fp8.dequantize(q), fp8.dequantize(k), fp8.dequantize(v)
    if not norms:
        return  # with scores in the thousands
    out = flash8.flash_attn_func(*found, causal=True)
    want_out, _ = oracle.attention(q.double(), k.double(), v.double(), causal=True)
    FP8_REL_L2.check("O", rel_l2(out, want_out))


def test_a_packed_sequence_is_a_sequence():
    """With the bits that it has alone, and attention takes both."""
    lengths = (130, 1, 60)
    p = make((191,), 144, rope="halves", norms=True, cu_seqlens=cumulative(lengths).tolist())
    packed = call(p)
    q, k, v = packed
    out = flash8.flash_attn_varlen_func(q, k, v, p.cu_seqlens, p.cu_seqlens, 130, 130, causal=True)
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        alone = p._replace(a=p.a[None, rows], scale_a=p.scale_a[rows], cu_seqlens=None)
        tensors = call(alone)
        assert torch.equal(tensors[0].data[0].view(torch.uint8), q.data[rows].view(torch.uint8))
        want = flash8.flash_attn_func(*tensors, causal=True)
        assert torch.equal(out[rows], want[0])
        begin += length


@pytest.mark.parametrize("granularity", ["tensor", "row", "1x128", "128x128"])
def test_scales(granularity):
    """Those of the rows, in a's shape too."""
    p = make((2, 70), 272, granularity=granularity)
    found = call(p)
    if granularity in ("row", "1x128"):
        wide = p.scale_a.view(2, 70, -1)
        for x, y in zip(call(p._replace(scale_a=wide)), found, strict=True):
            assert_equal(x, y)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_no_token(shape):
    q, k, v = call(make(shape, 32, (2, 1), "tensor"))
    assert q.data.shape == (*shape, 2, 128) and k.data.shape == (*shape, 1, 128)
    assert v.data.shape == (shape[0], 1, 128, 128 * -(-shape[1] // 128))


def test_no_sequence():
    q, _, v = call(make((5,), 32, (2, 1), "tensor", cu_seqlens=[0]))
    assert q.data.shape == (5, 2, 128) and v.data.shape == (1, 128, 0)


TABLE = torch.ones(20, 64)
REFUSALS = [
    (TypeError, "a must have dtype torch.float8_e4m3fn", {"a": torch.ones(2, 5, 32)}),
    (ValueError, r"a must have .* dimensions", {"a": torch.ones(5, 32).to(E4M3)}),
    (ValueError, "cu_seqlens", {"cu_seqlens": int32([0, 5])}),
    (TypeError, "b must be a torch.Tensor", {"b": None}),
    (ValueError, "scale_a and scale_b must have one element", {"scale_a": torch.ones(9, 1)}),
    (TypeError, "scale_a must be a torch.Tensor, got None", {"scale_a": None}),
    (ValueError, "heads_q must be an integer at least 1, got 0", {"heads_q": 0}),
    (TypeError, "heads_kv must be an integer, got 1.5", {"heads_kv": 1.5}),
    (
        ValueError,
        "heads_q must be a multiple of heads_kv, got 3 and 2",
        {"heads_q": 3, "heads_kv": 2},
    ),
    (ValueError, r"b must have \(heads_q \+ 2 heads_kv\) \* head_dim columns", {"heads_q": 5}),
    (ValueError, r"bias must have shape", {"bias": torch.ones(3)}),
    (ValueError, "rotary_cos and rotary_sin must be given together", {"rotary_cos": TABLE}),
    (ValueError, "rotary_seqlens goes with rotary_cos", {"rotary_seqlens": int32([0, 0])}),
    (
        ValueError,
        "rotary_dim a multiple of 16 up to head_dim = 128",
        {"rotary_cos": TABLE[:, :60], "rotary_sin": TABLE[:, :60]},
    ),
    (
        ValueError,
        "rotary_cos must have a row for every position from 0 to 4, got 3 rows",
        {"rotary_cos": TABLE[:3], "rotary_sin": TABLE[:3]},
    ),
    (
        ValueError,
        r"rotary_seqlens must have shape \(batch,\)",
        {"rotary_cos": TABLE, "rotary_sin": TABLE, "rotary_seqlens": int32([0])},
    ),
    (
        ValueError,
        "rotary_cos must have a row for every position from -1",
        {"rotary_cos": TABLE, "rotary_sin": TABLE, "rotary_seqlens": int32([-1, 0])},
    ),
    (TypeError, "rotary_interleaved must be a bool", {"rotary_interleaved": 1}),
    (ValueError, r"q_norm_weight must have shape \(head_dim,\)", {"q_norm_weight": torch.ones(64)}),
    (TypeError, "k_norm_weight must be a torch.Tensor", {"k_norm_weight": 1.0}),
    (ValueError, "norm_eps must be from 0", {"norm_eps": -1.0}),
    (ValueError, r"seqused must have shape \(batch,\)", {"seqused": int32([3])}),
    (ValueError, "seqused", {"seqused": int32([3, 6])}),
]


@pytest.mark.parametrize(("error", "match", "changes"), REFUSALS)
def test_refusals(error, match, changes):
    given = {
        "a": torch.ones(2, 5, 32).to(E4M3),
        "b": torch.ones(512, 32).to(E4M3).t(),
        "scale_a": torch.ones(10, 1),
        "scale_b": torch.ones(1, 512),
        "heads_q": 2,
        "heads_kv": 1,
    }
    gemm.qkv_projection(**given)
    with pytest.raises(error, match=match):
        gemm.qkv_projection(**{**given, **changes})


def test_offsets_are_checked():
    p = make((10,), 32, granularity="tensor", cu_seqlens=[0, 4, 3, 10])
    with pytest.raises(ValueError, match="cu_seqlens"):
        call(p)


def test_there_is_no_derivative():
    p = make((1, 5), 32, granularity="tensor")
    needs = p._replace(scale_a=p.scale_a.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="has no derivative"):
        call(needs)
    with torch.no_grad():
        call(needs)


@pytest.mark.parametrize("place", PLACES)
def test_compiles_without_a_break(place):
    tokens, where = PLACES[place]
    p = make(tokens, 144, rope="halves", norms=True, **where)

    def function(p):
        q, k, v = call(p)
        return q.data, q.descale, k.data, k.descale, v.data, v.descale

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(p), function(p), strict=True):
        assert x.shape == y.shape and torch.equal(x.float(), y.float())


def test_a_layer_compiles():
    """From the hidden state to O."""
    weight = values(512, 144, seed=2).bfloat16()
    w8, scale_w = gemm.quantize(weight, "128x128")
    cos, sin = make((1, 1), 16, rope="halves").rope[:2]

    def layer(x):
        x8, scale_x = gemm.quantize(x.flatten(0, 1), "1x128")
        q, k, v = gemm.qkv_projection(
            x8.view(*x.shape[:2], -1),
            w8.t(),
            scale_x,
            scale_w.t(),
            heads_q=2,
            heads_kv=1,
            rotary_cos=cos,
            rotary_sin=sin,
        )
        return flash8.flash_attn_func(q, k, v, causal=True)

    x = values(2, 40, 144, seed=1).bfloat16()
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(found, layer(x)) and found.shape == (2, 40, 2, 128)


@pytest.mark.parametrize("place", PLACES)
def test_opcheck(place):
    tokens, where = PLACES[place]
    p = make(tokens, 144, rope="interleaved", norms=True, **where)
    arguments = (*p[:7], *p.rope, p.q_norm.weight, p.k_norm.weight, 1e-5, *p[-2:])
    # The other checks of opcheck compare float8 tensors, which torch cannot.
    torch.library.opcheck(torch.ops.flash8.qkv_projection, arguments, test_utils="test_faketensor")
