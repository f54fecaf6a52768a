"""flash8.nn: modules against torch's attention, packed against padded."""

import pytest
import torch

from flash8 import varlen
from flash8.nn import (
    DenseKVCache,
    FlashCrossAttention,
    FlashMHA,
    FlashSelfAttention,
    RotaryEmbedding,
)
from flash8.nn.mha import alibi_slopes
from nn_reference import CASES, LENGTHS, assert_near, make_mha, reference_mha, rotate_by_hand, sdpa


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


def test_alibi_slopes_come_back_from_the_meta_device():
    mha = FlashMHA(96, 3, alibi=True, device="meta").bfloat16()
    assert mha.alibi_slopes.is_meta and mha.alibi_slopes.dtype == torch.float32
    mha = mha.to_empty(device="cpu")
    mha.reset_parameters()
    assert torch.equal(mha.alibi_slopes, FlashMHA(96, 3, alibi=True).alibi_slopes)


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
    cache = DenseKVCache(2, 4, 64, 2, 16, dtype=torch.float32)
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
