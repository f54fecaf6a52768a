"""flash8.nn: modules against torch's attention, packed against padded, caches against neither."""

import math

import pytest
import torch
import torch.nn.functional as F

from flash8 import varlen
from flash8.float8 import E4M3
from flash8.nn import (
    DenseKVCache,
    FlashCrossAttention,
    FlashMHA,
    FlashSelfAttention,
    OutOfPagesError,
    PageAllocator,
    PagedKVCache,
    RotaryEmbedding,
)
from flash8.nn.mha import alibi_slopes
from tolerances import FP8_CACHE_TOTAL, rel_l2

LENGTHS = [5, 0, 17, 1, 9]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 3e-2}


def assert_near(got, want, dtype=None):
    tolerance = TOLERANCE[dtype or got.dtype]
    torch.testing.assert_close(
        got.double(), want.double(), rtol=tolerance, atol=tolerance, check_dtype=False
    )


def sdpa(q, k, v, **options):
    """torch's attention on (batch, seqlen, heads, head_dim)."""
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


def reference_mha(mha: FlashMHA, x: torch.Tensor) -> torch.Tensor:
    """The module's maths for one sequence (seqlen, embed_dim), spelt out in float64."""
    seqlen, heads, heads_kv, d = x.shape[0], mha.num_heads, mha.num_heads_kv, mha.head_dim
    weights = {name: p.double() for name, p in mha.named_parameters()}
    qkv = F.linear(x.double(), weights["in_proj.weight"], weights.get("in_proj.bias"))
    qkv = qkv.reshape(seqlen, heads + 2 * heads_kv, d).transpose(0, 1)
    q, k, v = qkv.split([heads, heads_kv, heads_kv])
    if mha.rotary is not None:
        q, k = (rotate_by_hand(t, mha.rotary) for t in (q, k))
    k, v = (t.repeat_interleave(heads // heads_kv, 0) for t in (k, v))
    scale = d**-0.5 if mha.softmax_scale is None else mha.softmax_scale
    scores = q @ k.transpose(1, 2) * scale
    if mha.softcap > 0:
        scores = mha.softcap * (scores / mha.softcap).tanh()
    distance = torch.arange(seqlen)[:, None] - torch.arange(seqlen)
    if mha.alibi_slopes is not None:
        scores = scores - mha.alibi_slopes.double()[:, None, None] * distance.abs()
    left, right = mha.window_size
    hidden = torch.zeros(seqlen, seqlen, dtype=torch.bool)
    hidden |= (distance > left) if left >= 0 else False
    hidden |= (distance < -right) if right >= 0 else False
    hidden |= (distance < 0) if mha.causal else False
    scores = scores.masked_fill(hidden, -math.inf)
    if mha.sinks is not None:
        sink = weights["sinks"][:, None, None].expand(heads, seqlen, 1)
        weight = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    else:
        weight = scores.softmax(-1)
    attended = (weight @ v).transpose(0, 1).reshape(seqlen, heads * d)
    return F.linear(attended, weights["out_proj.weight"], weights.get("out_proj.bias"))


def rotate_by_hand(x: torch.Tensor, rotary: RotaryEmbedding) -> torch.Tensor:
    """Complex multiplication, (heads, seqlen, d)."""
    half = rotary.dim // 2
    angles = torch.arange(x.shape[1])[:, None] * rotary.base ** (
        -torch.arange(0, rotary.dim, 2).double() / rotary.dim
    )
    turned, rest = x[..., : rotary.dim], x[..., rotary.dim :]
    if rotary.interleaved:
        pairs = turned.reshape(*turned.shape[:-1], half, 2)
    else:
        pairs = turned.reshape(*turned.shape[:-1], 2, half).transpose(-1, -2)
    pairs = torch.view_as_complex(pairs.clone(memory_format=torch.contiguous_format)) * torch.polar(
        torch.ones_like(angles), angles
    )
    pairs = torch.view_as_real(pairs)
    if not rotary.interleaved:
        pairs = pairs.transpose(-1, -2)
    return torch.cat((pairs.reshape(turned.shape), rest), -1)


CASES = {
    "plain": {},
    "causal": {"causal": True},
    "gqa": {"causal": True, "num_heads_kv": 2},
    "mqa, no bias": {"num_heads_kv": 1, "bias": False},
    "rotary": {"causal": True, "rotary_dim": 16},
    "rotary interleaved": {"rotary_dim": 16, "rotary_interleaved": True, "rotary_base": 100.0},
    "half rotary": {"causal": True, "rotary_dim": 16, "head_dim": 24},
    "window": {"window_size": (3, 2)},
    "causal window": {"causal": True, "window_size": (3, 0), "num_heads_kv": 2},
    "softcap": {"softcap": 0.5, "softmax_scale": 1.0},
    "sinks": {"causal": True, "sinks": True},
    "alibi": {"causal": True, "alibi": True},
}


def make_mha(dtype=torch.float32, **options) -> FlashMHA:
    torch.manual_seed(1)
    mha = FlashMHA(64, 4, dtype=dtype, **options)
    with torch.no_grad():
        if mha.in_proj.bias is not None:
            mha.in_proj.bias.normal_()
        if mha.sinks is not None:
            mha.sinks.normal_()
    return mha


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_packed_mha_is_the_reference(case, dtype):
    mha = make_mha(dtype, **CASES[case])
    parts = [torch.randn(length, 64, dtype=dtype) for length in LENGTHS]
    packed, cu_seqlens, max_seqlen = varlen.pack(parts)
    out = mha(packed, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    assert out.dtype == dtype
    want = torch.cat([reference_mha(mha, part) for part in parts])
    assert_near(out, want)


@pytest.mark.parametrize("case", CASES)
def test_dense_mha_is_the_reference(case):
    mha = make_mha(**CASES[case])
    x = torch.randn(2, 13, 64)
    want = torch.stack([reference_mha(mha, row) for row in x])
    assert_near(mha(x), want)


@pytest.mark.parametrize("case", ["gqa", "rotary interleaved", "sinks"])
def test_mha_gradients_are_the_reference(case):
    mha = make_mha(torch.float64, **CASES[case])
    parts = [torch.randn(length, 64, dtype=torch.float64) for length in LENGTHS]
    packed, cu_seqlens, max_seqlen = varlen.pack(parts)
    packed.requires_grad_()
    parameters = [packed, *mha.parameters()]
    upstream = torch.randn_like(packed)
    out = mha(packed, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    got = torch.autograd.grad(out, parameters, upstream)
    want_out = torch.cat([reference_mha(mha, part) for part in varlen.unpack(packed, cu_seqlens)])
    want = torch.autograd.grad(want_out, parameters, upstream)
    for g, w in zip(got, want, strict=True):
        assert_near(g, w, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["left", "right", "holes", "all of a row"])
def test_padded_mha_is_packed_mha(where, dtype):
    mha = make_mha(dtype, causal=True, rotary_dim=16, num_heads_kv=2)
    padding = {
        "left": [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]],
        "right": [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]],
        "holes": [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1]],
        "all of a row": [[1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    }[where]
    mask = torch.tensor(padding, dtype=torch.bool)
    x = torch.randn(2, 5, 64, dtype=dtype)
    x[mask] = float("nan")
    x.requires_grad_()
    out = mha(x, key_padding_mask=mask)
    assert out.shape == x.shape
    assert (out[mask] == 0).all()
    for row, hidden, got in zip(x, mask, out, strict=True):
        alone = row[~hidden]
        want = mha(alone, cu_seqlens=torch.tensor([0, len(alone)]).int(), max_seqlen=len(alone))
        assert_near(got[~hidden], want)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert (gradient[mask] == 0).all()
    assert gradient.isfinite().all()


def test_position_ids_shift_the_rotation():
    mha = make_mha(causal=True, rotary_dim=16)
    x = torch.randn(2, 6, 64)
    shifted = mha(x, position_ids=torch.arange(6) + 100)
    assert_near(shifted, mha(x), torch.bfloat16)  # rotation is relative; angles round
    scattered = mha(x, position_ids=torch.tensor([0, 3, 4, 9, 20, 31]))
    assert (scattered - mha(x)).abs().max() > 1e-3
    mask = torch.tensor([[1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    positions = torch.tensor([7, 0, 3, 4, 9, 20])
    padded = mha(x, key_padding_mask=mask, position_ids=positions)
    assert_near(padded[:1, 1:], mha(x[:1, 1:], position_ids=positions[1:]))


def test_mha_loads_and_matches_torch_mha():
    theirs = torch.nn.MultiheadAttention(64, 4, batch_first=True)
    torch.nn.init.normal_(theirs.in_proj_bias)
    ours = FlashMHA(64, 4)
    state = theirs.state_dict()
    ours.load_state_dict(state)
    assert set(state) == set(theirs.state_dict())
    wrapped = torch.nn.Sequential(FlashMHA(64, 4))
    wrapped.load_state_dict(torch.nn.Sequential(theirs).state_dict())
    x = torch.randn(3, 11, 64)
    mask = torch.arange(11) >= torch.tensor([[11], [4], [7]])
    want, _ = theirs(x, x, x, key_padding_mask=mask, need_weights=False)
    for module in (ours, wrapped[0]):
        assert_near(module(x, key_padding_mask=mask)[~mask], want[~mask])


def test_state_dict_round_trip():
    mha = make_mha(sinks=True, alibi=True, rotary_dim=16)
    assert set(mha.state_dict()) == {
        "in_proj.weight",
        "in_proj.bias",
        "out_proj.weight",
        "out_proj.bias",
        "sinks",
    }
    other = FlashMHA(64, 4, sinks=True, alibi=True, rotary_dim=16)
    other.load_state_dict(mha.state_dict())
    x = torch.randn(1, 5, 64)
    assert torch.equal(mha(x), other(x))


def test_dropout_only_in_training():
    mha = make_mha(dropout=0.5)
    x = torch.randn(2, 40, 64)
    plain = make_mha()(x)
    assert (mha(x) - plain).abs().max() > 1e-3
    assert torch.equal(mha.eval()(x), plain)


def test_slopes_and_angles_stay_exact_in_a_16_bit_module():
    mha = FlashMHA(96, 6, alibi=True, causal=True, rotary_dim=16)
    exact = mha.alibi_slopes.clone()
    mha = mha.bfloat16()
    assert mha.in_proj.weight.dtype == torch.bfloat16
    assert torch.equal(mha.alibi_slopes, exact)
    x = torch.randn(1, 40, 96).bfloat16()
    assert_near(mha(x)[0], reference_mha(mha, x[0]))


def test_mha_compiles():
    mha = make_mha(causal=True, rotary_dim=16, num_heads_kv=2)
    compiled = torch.compile(mha, fullgraph=True, backend="aot_eager")
    packed, cu_seqlens, max_seqlen = varlen.pack([torch.randn(n, 64) for n in LENGTHS])
    got = compiled(packed, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    assert_near(got, mha(packed, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_is_sdpa(causal, dtype):
    attention = FlashSelfAttention(causal=causal)
    qkv = torch.randn(2, 19, 3, 4, 16, dtype=dtype)
    assert_near(attention(qkv), sdpa(*qkv.unbind(2), is_causal=causal))
    parts = [torch.randn(n, 3, 4, 16, dtype=dtype) for n in LENGTHS]
    packed, cu_seqlens, max_seqlen = varlen.pack(parts)
    got = attention(packed, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    want = torch.cat(
        [sdpa(*part[None].unbind(2), is_causal=causal)[0] for part in parts if len(part)]
    )
    assert_near(got, want)


def test_self_attention_causal_can_be_overridden():
    qkv = torch.randn(1, 9, 3, 2, 16)
    assert torch.equal(
        FlashSelfAttention(causal=True)(qkv, causal=False), FlashSelfAttention()(qkv)
    )


def test_self_attention_options_arrive():
    qkv = torch.randn(1, 30, 3, 4, 16)
    plain = FlashSelfAttention(causal=True)(qkv)
    slopes = alibi_slopes(4)
    for options in (
        {"softcap": 0.3},
        {"window_size": (4, 0)},
        {"alibi_slopes": slopes},
        {"softmax_scale": 2.0},
        {"attention_dropout": 0.5},
    ):
        module = FlashSelfAttention(causal=True, **options)
        assert (module(qkv) - plain).abs().max() > 1e-3, options
    dropped = FlashSelfAttention(causal=True, attention_dropout=0.5).eval()
    assert torch.equal(dropped(qkv), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_attention_is_sdpa(dtype):
    attention = FlashCrossAttention()
    q, kv = torch.randn(2, 7, 4, 16, dtype=dtype), torch.randn(2, 21, 2, 2, 16, dtype=dtype)
    assert_near(attention(q, kv), sdpa(q, *kv.unbind(2)))
    packed_q, cu_q, max_q = varlen.pack([q[0], q[1, :3]])
    packed_kv, cu_k, max_k = varlen.pack([kv[0, :5], kv[1]])
    got = attention(packed_q, packed_kv, None, cu_q, max_q, cu_k, max_k)
    want = torch.cat(
        [
            sdpa(q[:1], *kv[:1, :5].unbind(2))[0],
            sdpa(q[1:, :3], *kv[1:].unbind(2))[0],
        ]
    )
    assert_near(got, want)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 16])
def test_rotary_is_complex_multiplication(interleaved, dim):
    rotary = RotaryEmbedding(dim, base=50.0, interleaved=interleaved)
    x = torch.randn(3, 11, 16, dtype=torch.float64)
    got = rotary(x.transpose(0, 1), torch.arange(11)).transpose(0, 1)
    torch.testing.assert_close(got, rotate_by_hand(x, rotary))
    cpu = torch.device("cpu")
    cos, sin = rotary.tables(11, torch.float32, cpu)
    angles = torch.arange(11)[:, None] * 50.0 ** (-torch.arange(0, dim, 2) / dim)
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())
    assert rotary.tables(5, torch.float32, cpu)[0].data_ptr() == cos.data_ptr()


def test_alibi_slopes():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    want = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    assert alibi_slopes(6).tolist() == want


def dense_cache(dtype=torch.float32, max_seqlen=64):
    return DenseKVCache(2, 4, max_seqlen, 2, 16, dtype=dtype)


def paged_cache(dtype=torch.float32, max_seqlen=64, num_pages=40, page_size=5):
    return PagedKVCache(2, num_pages, page_size, 4, max_seqlen, 2, 16, dtype=dtype)


CACHE_CASES = {
    "plain": {},
    "rotary": {"rotary_dim": 16},
    "rotary interleaved, window": {
        "rotary_dim": 16,
        "rotary_interleaved": True,
        "window_size": (6, 0),
    },
    "sinks, softcap": {"sinks": True, "softcap": 2.0},
    "alibi": {"alibi": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_cache", [dense_cache, paged_cache])
@pytest.mark.parametrize("case", CACHE_CASES)
@torch.no_grad()
def test_prefill_and_decode_is_the_full_forward(case, make_cache, dtype):
    layers = [make_mha(dtype, causal=True, num_heads_kv=2, **CACHE_CASES[case]) for _ in range(2)]
    cache = make_cache(dtype)
    texts = [torch.randn(n, 64, dtype=dtype) for n in (12, 3, 25)]
    cache.add_sequence()  # an idle row, so rows and batch places differ
    rows = [cache.add_sequence() for _ in texts]
    prefix = [7, 1, 20]

    def run(x, step, **packed):
        for index, layer in enumerate(layers):
            x = layer(x, cache=step.layer(index), **packed)
        step.commit()
        return x

    packed, cu_seqlens, max_seqlen = varlen.pack(
        [text[:n] for text, n in zip(texts, prefix, strict=True)]
    )
    step = cache.prepare(rows, prefix)
    outs = varlen.unpack(
        run(packed, step, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen), cu_seqlens
    )
    outs = [[out] for out in outs]
    positions = list(prefix)
    while alive := [i for i, text in enumerate(texts) if positions[i] < len(text)]:
        x = torch.stack([texts[i][positions[i]][None] for i in alive])
        out = run(x, cache.prepare([rows[i] for i in alive], 1))
        for place, i in enumerate(alive):
            outs[i].append(out[place])
            positions[i] += 1
    for text, parts, row in zip(texts, outs, rows, strict=True):
        assert cache.length(row) == len(text)
        x = text[None]
        for layer in layers:
            x = layer(x)
        assert_near(torch.cat(parts), x[0], dtype)


@pytest.mark.parametrize("make_cache", [DenseKVCache, PagedKVCache])
@pytest.mark.parametrize("rotary_dim", [0, 16])
@torch.no_grad()
def test_e4m3_cache_is_attention_over_what_it_holds(make_cache, rotary_dim):
    mha = make_mha(causal=True, num_heads_kv=2, rotary_dim=rotary_dim)
    sizes = (2, 4, 64, 2, 16) if make_cache is DenseKVCache else (2, 40, 5, 4, 64, 2, 16)
    descales = torch.tensor([[1.0, 1.0], [0.015, 0.03]]), torch.tensor([[1.0, 1.0], [0.01, 0.02]])
    cache = make_cache(*sizes, dtype=E4M3, k_descale=descales[0], v_descale=descales[1])
    wide = make_cache(*sizes, dtype=torch.float32)
    x = torch.randn(2, 17, 64)
    results = []
    for one in (cache, wide):
        step = one.prepare([one.add_sequence(), one.add_sequence()], 12)
        results.append(mha(x[:, :12], cache=step.layer(1)))
        step.commit()
    for name, descale in zip("kv", descales, strict=True):
        held = getattr(cache, name)[1].float() * descale[1][:, None]
        error = rel_l2(held, getattr(wide, name)[1])
        assert 0.005 < error < 0.04, error  # rounded once; a wrong descale saturates or is above
        getattr(wide, name)[1].copy_(held)
    assert 0.001 < rel_l2(results[0], results[1]) < 0.06
    outs = [mha(x[:, 12:], cache=one.prepare([0, 1], 5).layer(1)) for one in (cache, wide)]
    FP8_CACHE_TOTAL.check("out", rel_l2(*outs))


def test_descales_belong_to_an_e4m3_cache():
    with pytest.raises(ValueError, match="k_descale needs a cache of dtype"):
        DenseKVCache(2, 4, 64, 2, 16, dtype=torch.bfloat16, k_descale=torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"v_descale must .*\(num_layers, num_heads_kv\)"):
        PagedKVCache(2, 4, 16, 2, 64, 2, 16, dtype=E4M3, v_descale=torch.ones(2, 1))
    with pytest.raises(TypeError, match="k_descale"):
        PagedKVCache(2, 4, 16, 2, 64, 2, 16, dtype=E4M3, k_descale=torch.ones(2, 2).double())


@torch.no_grad()
def test_pages_are_taken_as_a_sequence_grows_and_come_back():
    mha = make_mha(causal=True, num_heads_kv=2)
    cache = paged_cache(num_pages=6, page_size=4, max_seqlen=16)
    first, second = cache.add_sequence(), cache.add_sequence()
    pages_needed = []
    for _ in range(9):
        step = cache.prepare([first], 1)
        mha(torch.randn(1, 1, 64), cache=step.layer(0))
        step.commit()
        pages_needed.append(cache.allocator.num_used)
    assert pages_needed == [1, 1, 1, 1, 2, 2, 2, 2, 3]
    cache.prepare([second], 12).commit()
    assert cache.allocator.num_free == 0
    with pytest.raises(OutOfPagesError, match="1 pages wanted, 0 of 6"):
        cache.prepare([second], 1)
    assert cache.length(second) == 12
    held = cache.pages_of(first)
    assert not set(held) & set(cache.pages_of(second))
    cache.remove_sequence(first)
    assert cache.allocator.num_free == 3
    third = cache.add_sequence()
    cache.prepare([third], 12).commit()
    assert set(cache.pages_of(third)) == set(held)


@torch.no_grad()
def test_used_pages_are_overwritten_not_read():
    """A page that comes back from another sequence, full of NaN, does no harm."""
    mha = make_mha(causal=True, num_heads_kv=2)
    cache = paged_cache(num_pages=3, page_size=4, max_seqlen=12)
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    row = cache.add_sequence()
    x = torch.randn(1, 6, 64)
    out = mha(x, cache=cache.prepare([row], 6).layer(0))
    assert_near(out, mha(x))


def test_allocator_refuses_strangers():
    allocator = PageAllocator(4)
    pages = allocator.allocate(3)
    assert sorted(pages) == sorted(set(pages))
    with pytest.raises(ValueError, match="pages must be in use and distinct"):
        allocator.release([pages[0], pages[0]])
    with pytest.raises(ValueError, match="pages must be in use"):
        allocator.release([3])
    allocator.release(pages)
    assert allocator.num_free == 4
    with pytest.raises(OutOfPagesError, match="5 pages wanted, 4 of 4"):
        allocator.allocate(5)


@pytest.mark.parametrize("make_cache", [dense_cache, paged_cache])
def test_bad_cache_calls(make_cache):
    cache = make_cache(max_seqlen=10)
    row = cache.add_sequence()
    with pytest.raises(ValueError, match="would hold 11 tokens, more than max_seqlen = 10"):
        cache.prepare([row], 11)
    with pytest.raises(ValueError, match="rows must be distinct"):
        cache.prepare([row, row], 1)
    with pytest.raises(ValueError, match="rows must be distinct and at least one"):
        cache.prepare([], 1)
    with pytest.raises(ValueError, match="new_tokens must hold 1 numbers, got 2"):
        cache.prepare([row], [1, 2])
    with pytest.raises(ValueError, match="new_tokens must be an integer"):
        cache.prepare([row], -1)
    with pytest.raises(ValueError, match="row must be one that add_sequence returned, got 3"):
        cache.prepare([3], 1)
    with pytest.raises(ValueError, match="got 2"):
        cache.remove_sequence(2)
    for _ in range(3):
        cache.add_sequence()
    with pytest.raises(RuntimeError, match="all max_batch = 4 rows"):
        cache.add_sequence()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads_kv": 3}, "num_heads_kv must be a positive divisor of num_heads = 4, got 3"),
        ({"embed_dim": 66}, "embed_dim must be divisible by num_heads = 4 .*got 66"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"rotary_dim": 32}, r"rotary_dim must lie in \[0, 16\], got 32"),
        ({"rotary_dim": 3}, "dim must be positive and even, got 3"),
        ({"rotary_dim": 16, "rotary_base": -1.0}, "base must be positive, got -1.0"),
    ],
)
def test_bad_mha(options, message):
    with pytest.raises(ValueError, match=message):
        FlashMHA(**{"embed_dim": 64, "num_heads": 4, **options})


def test_bad_mha_inputs():
    mha = make_mha()
    x, cu_seqlens = torch.randn(2, 5, 64), torch.tensor([0, 5, 10]).int()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"x must be \(total, embed_dim\).*\(2, 5, 64\)"):
        mha(x, cu_seqlens=cu_seqlens, max_seqlen=5)
    with pytest.raises(ValueError, match=r"x must be \(batch, seqlen, embed_dim\).*\(10, 64\)"):
        mha(x.flatten(0, 1))
    with pytest.raises(ValueError, match="max_seqlen is required with cu_seqlens"):
        mha(x.flatten(0, 1), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="key_padding_mask goes with neither"):
        mha(x.flatten(0, 1), cu_seqlens=cu_seqlens, max_seqlen=5, key_padding_mask=mask)
    with pytest.raises(TypeError, match=r"key_padding_mask must be bool.*float32"):
        mha(x, key_padding_mask=mask.float())
    cache = dense_cache()
    step = cache.prepare([cache.add_sequence()], 5)
    with pytest.raises(ValueError, match="cache needs causal"):
        mha(x[:1], cache=step.layer(0))
    with pytest.raises(ValueError, match="position_ids must be None with a cache"):
        make_mha(causal=True)(x[:1], cache=step.layer(0), position_ids=torch.arange(5))
    with pytest.raises(ValueError, match="cu_seqlens_k needs cu_seqlens"):
        FlashCrossAttention()(x[:, :, None], x[:, :, None], cu_seqlens_k=cu_seqlens)
    with pytest.raises(ValueError, match="max_seqlen is required with cu_seqlens"):
        FlashSelfAttention()(torch.randn(10, 3, 2, 16), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="x must have at least 16 channels to rotate, got 8"):
        RotaryEmbedding(16)(torch.randn(2, 3, 8), torch.arange(2))
