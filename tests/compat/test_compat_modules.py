"""MHA, FlashMHA, losses and norms: against torch's own modules with the same weights."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flash8
from flash8.compat.flash_attn.bert_padding import unpad_input
from flash8.compat.flash_attn.flash_attention import FlashAttention, FlashMHA
from flash8.compat.flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash8.compat.flash_attn.modules.mha import (
    MHA,
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)
from flash8.compat.flash_attn.ops import rms_norm as norms
from flash8.compat.flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn

EMBED, HEADS, DIM = 64, 4, 16
MASK = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def sdpa(q, k, v, **options):
    """(batch, seqlen, heads, head_dim) in and out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
def test_inner_attention(causal):
    qkv = torch.randn(2, 7, 3, HEADS, DIM)
    q, k, v = qkv.unbind(2)
    want = sdpa(q, k, v, is_causal=causal)
    near(FlashSelfAttention(causal)(qkv), want)
    near(FlashSelfAttention(not causal)(qkv, causal), want)
    near(FlashCrossAttention(causal)(q, qkv[:, :, 1:]), want)
    packed, _, cu_seqlens, longest, _ = unpad_input(qkv, MASK)
    out = FlashSelfAttention(causal)(packed, cu_seqlens=cu_seqlens, max_seqlen=longest)
    near(out[:5], sdpa(*(x[:1, :5] for x in (q, k, v)), is_causal=causal)[0])
    lengths = (cu_seqlens, longest) * 2
    near(FlashCrossAttention(causal)(packed[:, 0], packed[:, 1:], None, *lengths), out)
    near(SelfAttention(causal)(qkv, key_padding_mask=MASK)[MASK], out)
    if not causal:
        whole = CrossAttention()(q, qkv[:, :, 1:], key_padding_mask=MASK)
        near(whole, sdpa(q, k, v, attn_mask=MASK[:, None, None]))


def test_options_of_the_inner_attention():
    qkv = torch.randn(1, 9, 3, HEADS, DIM)
    slopes = torch.tensor(get_alibi_slopes(HEADS))
    near(slopes, 2.0 ** -torch.tensor([2.0, 4, 6, 8]))
    assert len(get_alibi_slopes(6)) == 6 and get_alibi_slopes(6)[4] == 2**-1
    module = FlashSelfAttention(True, 0.3, 0.0, (4, 0), slopes)
    assert module.state_dict() == {}
    rows = torch.arange(9)
    distance = (rows[:, None] - rows).float()
    bias = (-slopes[:, None, None] * distance.abs()).masked_fill(
        (distance < 0) | (distance > 4), float("-inf")
    )
    near(module(qkv), sdpa(*qkv.unbind(2), attn_mask=bias, scale=0.3))
    dropping = FlashSelfAttention(attention_dropout=0.5)
    assert not torch.equal(dropping(qkv), dropping(qkv))
    assert torch.equal(dropping.eval()(qkv), FlashSelfAttention()(qkv))


def reference(mha, x, heads_kv=HEADS, **options):
    qkv = mha.Wqkv(x)
    q, k, v = qkv.split((EMBED, heads_kv * DIM, heads_kv * DIM), -1)
    q, k, v = (part.unflatten(-1, (-1, DIM)) for part in (q, k, v))
    return mha.out_proj(sdpa(q, k, v, **options).flatten(-2))


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("heads_kv", [None, 2])
def test_mha(heads_kv, flash):
    mha = MHA(EMBED, HEADS, heads_kv, causal=True, use_flash_attn=flash, checkpointing=True)
    names = ["Wqkv.weight", "Wqkv.bias", "out_proj.weight", "out_proj.bias"]
    assert list(mha.state_dict()) == names
    x = torch.randn(2, 7, EMBED, requires_grad=True)
    want = reference(mha, x, heads_kv or HEADS, is_causal=True)
    near(mha(x), want)
    turned = MHA(EMBED, HEADS, heads_kv, rotary_emb_dim=16, use_flash_attn=flash)
    assert torch.autograd.grad(turned(x).sum(), turned.Wqkv.weight)[0].any()
    leaves = [x, *mha.parameters()]
    got = torch.autograd.grad(mha(x).square().sum(), leaves)
    for gradient, expected in zip(
        got, torch.autograd.grad(want.square().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)
    if flash:
        packed, _, cu_seqlens, longest, _ = unpad_input(x, MASK)
        out = mha(packed, cu_seqlens=cu_seqlens, max_seqlen=longest)
        near(out, want[MASK])  # causal: padding at the end hides nothing
    elif heads_kv is None:
        near(mha(x, key_padding_mask=MASK)[MASK], want[MASK])


def test_mha_cross_attention():
    mha = MHA(EMBED, HEADS, 2, cross_attn=True, use_flash_attn=True, return_residual=True)
    x, memory = torch.randn(2, 3, EMBED), torch.randn(2, 5, EMBED)
    q = mha.Wq(x).unflatten(-1, (HEADS, DIM))
    k, v = mha.Wkv(memory).unflatten(-1, (2, 2, DIM)).unbind(2)
    want = mha.out_proj(sdpa(q, k, v).flatten(-2))
    out, residual = mha(x, memory)
    near(out, want)
    assert residual is x
    near(mha(x, memory, mixer_subset=slice(0, 1))[0], want[:, :1])


@pytest.mark.parametrize(
    "options",
    [
        dict(rotary_emb_dim=16),
        dict(rotary_emb_dim=8, rotary_emb_interleaved=True),
        dict(num_heads_kv=2, window_size=(3, 0)),
        dict(use_alibi=True),
    ],
    ids=["rotary", "rotary that the append cannot do", "gqa and window", "alibi"],
)
@pytest.mark.parametrize("by_lengths", [False, True])
def test_mha_generates_what_it_computes_at_once(options, by_lengths):
    mha = MHA(EMBED, HEADS, causal=True, layer_idx=3, use_flash_attn=True, **options)
    x = torch.randn(2, 8, EMBED)
    params = SimpleNamespace(
        max_seqlen=8,
        max_batch_size=2,
        seqlen_offset=0,
        batch_size_offset=0,
        key_value_memory_dict={},
        lengths_per_sample=None,
    )
    with torch.no_grad():
        want = mha(x)
        near(mha(x[:, :5], inference_params=params), want[:, :5])
        for token in range(5, 8):
            params.seqlen_offset = token
            if by_lengths:
                params.lengths_per_sample = torch.full((2,), token, dtype=torch.int32)
            near(mha(x[:, token, None], inference_params=params), want[:, token, None])
    cache = mha.allocate_inference_cache(2, 8)
    assert params.key_value_memory_dict[3].shape == cache.shape


def test_mha_refuses_by_name():
    with pytest.raises(NotImplementedError, match="dwconv"):
        MHA(EMBED, HEADS, dwconv=True)
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_heads_kv"):
        MHA(EMBED, HEADS, 3)
    with pytest.raises(ValueError, match="use_alibi and window_size need use_flash_attn"):
        MHA(EMBED, HEADS, use_alibi=True)
    with pytest.raises(ValueError, match="key_padding_mask needs use_flash_attn=False"):
        MHA(EMBED, HEADS, use_flash_attn=True)(torch.randn(2, 7, EMBED), key_padding_mask=MASK)


def torch_mha(flash):
    """`nn.MultiheadAttention` with the weights of a FlashMHA."""
    ours = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    weights = {
        "in_proj_weight": flash.Wqkv.weight,
        "in_proj_bias": flash.Wqkv.bias,
        "out_proj.weight": flash.out_proj.weight,
        "out_proj.bias": flash.out_proj.bias,
    }
    ours.load_state_dict(weights)
    return ours


def test_flash_mha_is_torch_mha():
    flash = FlashMHA(EMBED, HEADS)
    theirs = torch_mha(flash)
    x = torch.randn(2, 7, EMBED)
    want, _ = theirs(x, x, x, need_weights=False)
    near(flash(x)[0], want)
    padded, _ = theirs(x, x, x, key_padding_mask=~MASK, need_weights=False)
    for out in (
        flash(x, MASK),
        flash(x, key_padding_mask=MASK),
        flash(x, x, x, key_padding_mask=~MASK),
        flash(x, x, x, key_padding_mask=torch.zeros(2, 7).masked_fill(~MASK, -torch.inf)),
    ):
        near(out[0][MASK], padded[MASK])
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    causal, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
    near(FlashMHA.forward(flash, x, x, x, attn_mask=mask, is_causal=True)[0], causal)
    with pytest.raises(ValueError, match="attn_mask is not supported"):
        flash(x, x, x, attn_mask=mask)
    with pytest.raises(ValueError, match="FlashMHA is self-attention"):
        flash(x, x.clone(), x)
    with pytest.raises(ValueError, match="need_weights must be False"):
        flash(x, need_weights=True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_flash_mha_in_an_encoder(norm_first, training):
    layer = nn.TransformerEncoderLayer(
        EMBED, HEADS, 32, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    layer.self_attn = FlashMHA(EMBED, HEADS)
    ours = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    for theirs, mine in zip(encoder.layers, ours.layers, strict=True):
        attention = mine.self_attn
        rest = {k: v for k, v in theirs.state_dict().items() if "self_attn" not in k}
        mine.load_state_dict(rest, strict=False)
        theirs.self_attn = torch_mha(attention)
    x = torch.randn(2, 7, EMBED)
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    for options in (
        dict(src_key_padding_mask=~MASK),
        dict(mask=mask, is_causal=True),
        dict(mask=mask, src_key_padding_mask=torch.zeros(2, 7).masked_fill(~MASK, -torch.inf)),
    ):
        near(ours(x, **options)[MASK], encoder(x, **options)[MASK])


@pytest.mark.parametrize("heads_kv", [None, 2])
def test_checkpoints_of_flash_attention_2_load(heads_kv):
    mha = MHA(EMBED, HEADS, heads_kv, use_flash_attn=True)
    x = torch.randn(2, 7, EMBED)
    native = flash8.nn.FlashMHA(EMBED, HEADS, num_heads_kv=heads_kv)
    native.load_state_dict(mha.state_dict())
    near(native(x), mha(x))
    if heads_kv is None:
        flash = FlashMHA(EMBED, HEADS)
        flash.load_state_dict(mha.state_dict())
        near(flash(x)[0], mha(x))


def test_flash_attention_1():
    qkv = torch.randn(2, 7, 3, HEADS, DIM)
    module = FlashAttention(softmax_scale=0.2)
    out, weights = module(qkv, causal=True)
    assert weights is None
    near(out, sdpa(*qkv.unbind(2), is_causal=True, scale=0.2))
    packed, _, cu_seqlens, longest, _ = unpad_input(qkv, MASK)
    near(module(packed, cu_seqlens=cu_seqlens, max_s=longest)[0], module(qkv, MASK)[0][MASK])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction):
    logits = torch.randn(6, 11, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.tensor([3, -100, 0, 10, 7, 7])
    loss = CrossEntropyLoss(reduction=reduction, label_smoothing=0.1, logit_scale=0.5)
    want = F.cross_entropy(logits.float() * 0.5, labels, reduction=reduction, label_smoothing=0.1)
    near(loss(logits, labels), want)
    both = CrossEntropyLoss(reduction=reduction, lse_square_scale=0.01, return_z_loss=True)
    value, z_loss = both(logits, labels)
    squares = 0.01 * logits.float().logsumexp(-1).square() * (labels != -100)
    if reduction != "none":
        squares = squares.sum() / (5 if reduction == "mean" else 1)
    near(z_loss, squares)
    near(value, F.cross_entropy(logits.float(), labels, reduction=reduction) + squares)
    assert value.requires_grad and not z_loss.requires_grad
    with pytest.raises(NotImplementedError, match="process_group"):
        CrossEntropyLoss(process_group=object())(logits, labels)


def test_norms():
    x, residual = torch.randn(3, 8, dtype=torch.bfloat16), torch.randn(3, 8)
    weight, bias = torch.rand(8), torch.rand(8)
    near(norms.rms_norm(x, weight, 1e-4), F.rms_norm(x.float(), (8,), weight, 1e-4).bfloat16())
    module = norms.RMSNorm(8)
    near(module(residual), F.rms_norm(residual, (8,), None, 1e-5))
    out, kept = rms_norm_fn(x, weight, bias, residual, eps=1e-5, prenorm=True)
    summed = x.float() + residual
    assert kept.dtype == torch.float32 and out.dtype == x.dtype
    near(kept, summed)
    near(out, (F.rms_norm(summed, (8,), weight, 1e-5) + bias).bfloat16())
    out = layer_norm_fn(x.float(), weight, bias, residual, eps=1e-5, zero_centered_weight=True)
    near(out, F.layer_norm(summed, (8,), weight + 1, bias, 1e-5))
    centered = RMSNorm(8, zero_centered_weight=True)
    near(centered(residual), F.rms_norm(residual, (8,), None, 1e-5))
    _, kept = RMSNorm(8)(x, prenorm=True, residual_in_fp32=True)
    assert kept.dtype == torch.float32
    with pytest.raises(NotImplementedError, match="x1 is not supported"):
        rms_norm_fn(x, weight, None, x1=x)


def test_norms_with_dropout_and_scales():
    x, residual, scale = torch.randn(4, 8), torch.randn(4, 8), torch.rand(8)
    rows = torch.rand(4)
    options = dict(rowscale=rows, layerscale=scale, prenorm=True)
    _, kept = norms.dropout_add_rms_norm(x, residual, scale, None, 0.0, 1e-5, **options)
    near(kept, x * scale * rows[:, None] + residual)
    module = norms.DropoutAddRMSNorm(8, p=0.5, prenorm=True)
    _, kept = module(torch.ones(64, 8))
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(module.eval()(torch.ones(4, 8))[1], torch.ones(4, 8))
