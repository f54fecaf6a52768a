"""The forward and backward without autograd, of FlashAttention-2 and -3."""

import pytest
import torch

import flash8
from flash8.compat import flash_attn_interface as fa3
from flash8.compat.flash_attn import flash_attn_interface as fa2
from flash8.compat.flash_attn_2_cuda import varlen_bwd

CU_SEQLENS = torch.tensor([0, 7, 20], dtype=torch.int32)
SLOPES = torch.tensor([0.1, 0.4])
LENGTHS = (CU_SEQLENS, CU_SEQLENS, 13, 13)


def tensors(packed, dtype=torch.float32):
    shape = (20, 2, 16) if packed else (2, 11, 2, 16)
    return [torch.randn(shape, dtype=dtype) for _ in range(4)]


def gradients_of(function, q, k, v, dout):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(function(*leaves), leaves, dout)


def test_dense_forward_and_backward_by_position():
    q, k, v, dout = tensors(packed=False)
    options = (0.3, 0.5, True, 6, 0, 3.0, SLOPES)
    out, lse, probabilities, rng_state = fa2._flash_attn_forward(q, k, v, *options, True)
    assert probabilities.shape == (2, 2, 128, 128) and rng_state.shape == (2,)
    named = dict(
        softmax_scale=0.5,
        causal=True,
        window_size=(6, 0),
        softcap=3.0,
        alibi_slopes=SLOPES,
        dropout_p=0.3,
        dropout_seed=int(rng_state[0]),
    )
    want, want_lse = flash8.flash_attn_func(q, k, v, return_attn_probs=True, **named)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    written = [torch.full_like(q, float("nan")) for _ in range(3)]
    softmax_d = fa2._flash_attn_backward(
        dout, q, k, v, out, lse, *written, *options, False, rng_state
    )
    wanted = gradients_of(lambda *x: flash8.flash_attn_func(*x, **named), q, k, v, dout)
    for got, gradient in zip(written, wanted, strict=True):
        assert torch.equal(got, gradient)
    torch.testing.assert_close(softmax_d, (dout * out).sum(-1).transpose(1, 2))


def test_packed_forward_and_backward_by_position():
    q, k, v, dout = tensors(packed=True)
    options = (0.3, 0.5, True, 6, 0, 3.0, SLOPES)
    out, lse, probabilities, rng_state = fa2._flash_attn_varlen_forward(
        q, k, v, *LENGTHS, *options, True
    )
    assert probabilities.shape == (2, 2, 128, 128)
    named = dict(
        softmax_scale=0.5,
        causal=True,
        window_size=(6, 0),
        softcap=3.0,
        alibi_slopes=SLOPES,
        dropout_p=0.3,
        dropout_seed=int(rng_state[0]),
    )
    want, want_lse = flash8.flash_attn_varlen_func(
        q, k, v, *LENGTHS, return_attn_probs=True, **named
    )
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    wanted = gradients_of(
        lambda *x: flash8.flash_attn_varlen_func(*x, *LENGTHS, **named), q, k, v, dout
    )
    # Ring attention hands on slices of the heads of a larger buffer.
    buffers = [torch.full((20, 3, 16), float("nan")) for _ in range(3)]
    written = [buffer[:, 1:] for buffer in buffers]
    fa2._flash_attn_varlen_backward(
        dout, q, k, v, out, lse, *written, *LENGTHS, *options, False, rng_state
    )
    for got, gradient in zip(written, wanted, strict=True):
        assert torch.equal(got, gradient)
    again = [torch.empty_like(q) for _ in range(3)]
    by_position = (*LENGTHS[:2], SLOPES, *LENGTHS[2:], 0.3, 0.5, False, True, 6, 0, 3.0, False)
    done = varlen_bwd(dout, q, k, v, out, lse, *again, *by_position, None, rng_state)
    assert done[0] is again[0]
    for got, gradient in zip(again, wanted, strict=True):
        assert torch.equal(got, gradient)


def test_a_backward_with_dropout_needs_the_state_of_the_forward():
    q, k, v, dout = tensors(packed=False)
    options = (0.3, None, False, -1, -1, 0.0, None)
    out, lse, *_ = fa2._flash_attn_forward(q, k, v, *options, False)
    with pytest.raises(ValueError, match="rng_state must be the forward's"):
        fa2._flash_attn_backward(dout, q, k, v, out, lse, None, None, None, *options, False)


def test_pages_and_used_lengths():
    q, k, v, _ = tensors(packed=True)
    options = (0.0, None, True)
    want, want_lse, *_ = fa2._flash_attn_varlen_forward(q, k, v, *LENGTHS, *options)
    table = torch.tensor([[2, 0], [0, 1]], dtype=torch.int32)
    pages = [torch.zeros(3, 16, 2, 16) for _ in range(2)]
    for cache, x in zip(pages, (k, v), strict=True):
        cache[2, :7], cache[0, :13] = x[:7], x[7:]
    out, lse, *_ = fa2._flash_attn_varlen_forward(
        q, *pages, *LENGTHS, *options, block_table=table, num_splits=1
    )
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    used = torch.tensor([7, 5], dtype=torch.int32)
    for lengths in (dict(seqused_k=used), dict(seqused_k=used, block_table=table)):
        keys = pages if "block_table" in lengths else (k, v)
        shorter, *_ = fa2._flash_attn_varlen_forward(q, *keys, *LENGTHS, *options, **lengths)
        want = flash8.flash_attn_varlen_func(q, k, v, *LENGTHS, seqused_k=used, causal=True)
        torch.testing.assert_close(shorter, want)


def test_flash_attention_3_by_position():
    q, k, v, dout = tensors(packed=True)
    q.requires_grad_()
    nothing = (None,) * 9
    arguments = (*(None,) * 4, *LENGTHS[:2], None, None, None, 13, 13, *nothing)
    options = dict(causal=True, softmax_scale=0.5, window_size_left=6, window_size_right=-1)
    out, lse, *_ = fa3._flash_attn_forward(q, k, v, *arguments, **options)
    named = dict(softmax_scale=0.5, causal=True, window_size=(6, -1))
    want, want_lse = flash8.flash_attn_varlen_func(
        q, k, v, *LENGTHS, return_attn_probs=True, **named
    )
    assert torch.equal(out, want) and torch.equal(lse, want_lse) and out.requires_grad
    q = q.detach()
    written = [torch.full_like(q, float("nan")) for _ in range(3)]
    fa3._flash_attn_backward(
        dout,
        q,
        k,
        v,
        out.detach(),
        lse.detach(),
        *LENGTHS[:2],
        None,
        None,
        13,
        13,
        *written,
        0.5,
        True,
        6,
        -1,
    )
    wanted = gradients_of(
        lambda *x: flash8.flash_attn_varlen_func(*x, *LENGTHS, **named), q, k, v, dout
    )
    for got, gradient in zip(written, wanted, strict=True):
        assert torch.equal(got, gradient)


def test_flash_attention_3_appends():
    q, k, v = (torch.randn(2, 3, 2, 16) for _ in range(3))
    caches = [[torch.zeros(2, 16, 2, 16) for _ in range(2)] for _ in range(2)]
    used = torch.tensor([4, 0], dtype=torch.int32)
    angles = torch.rand(16, 8)
    rotary = dict(rotary_cos=angles.cos(), rotary_sin=angles.sin())
    out, lse, *_ = fa3._flash_attn_forward(
        q, *caches[0], k, v, seqused_k=used, causal=True, rotary_interleaved=False, **rotary
    )
    want, want_lse, *_ = flash8.flash_attn_with_kvcache(
        q,
        *caches[1],
        k,
        v,
        cache_seqlens=used,
        causal=True,
        rotary_interleaved=False,
        num_splits=1,
        return_softmax_lse=True,
        **rotary,
    )
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert torch.equal(caches[0][0], caches[1][0]) and caches[0][0][0, 4].any()
    with pytest.raises(ValueError, match="seqused_q cannot be combined"):
        fa3._flash_attn_forward(q, *caches[0], k, v, seqused_q=used, seqused_k=used)


OPS = torch.ops.flash_attn_3


def test_every_op_is_there():
    q, k, v, dout = tensors(packed=False)
    out, lse, *_ = OPS.fwd(q, k, v, is_causal=True)
    want, want_lse = flash8.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    written = [torch.full_like(q, float("nan")) for _ in range(3)]
    assert len(OPS.bwd(dout, q, k, v, out, lse, *written, is_causal=True)) == 5
    wanted = gradients_of(lambda *x: flash8.flash_attn_func(*x, causal=True), q, k, v, dout)
    for got, gradient in zip(written, wanted, strict=True):
        assert torch.equal(got, gradient)
    named = dict(zip(("dq", "dk", "dv"), (torch.empty_like(q) for _ in range(3)), strict=True))
    OPS._flash_attn_backward(dout, q, k, v, out, lse, **named, is_causal=True)
    assert torch.equal(named["dv"], written[2])
    partial = torch.stack((out, out)), torch.stack((lse, lse)).transpose(-1, -2).contiguous()
    merged, merged_lse = OPS.fwd_combine(*partial)
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse, lse.transpose(1, 2) + torch.tensor(2.0).log())
    used = torch.tensor([9, 11], dtype=torch.int32)
    sizes = (2, 11, 11, 2, 2, 16)
    plan = OPS.get_scheduler_metadata(*sizes, 16, torch.float32, used, is_causal=True)
    want = flash8.get_scheduler_metadata(*sizes, used, torch.float32, causal=True)
    assert torch.equal(plan, want)


def test_the_op_and_the_function_have_other_defaults():
    q, new = torch.randn(2, 3, 2, 16), torch.randn(2, 3, 2, 16)
    used, angles = torch.tensor([4, 0], dtype=torch.int32), torch.rand(16, 8)
    rotary = dict(rotary_cos=angles.cos(), rotary_sin=angles.sin())
    caches = [[torch.zeros(2, 16, 2, 16) for _ in range(2)] for _ in range(3)]
    OPS.fwd(q, *caches[0], new, new, seqused_k=used, **rotary)
    OPS._flash_attn_forward(q, *caches[1], new, new, seqused_k=used, **rotary)
    for interleaved, (k, _) in zip((False, True), caches, strict=False):
        flash8.flash_attn_with_kvcache(
            q, *caches[2], new, new, cache_seqlens=used, rotary_interleaved=interleaved, **rotary
        )
        assert torch.equal(k, caches[2][0])


def test_the_forward_op_traces_and_is_differentiable():
    q, k, v, dout = tensors(packed=False)

    def layer(q, k, v):
        return OPS._flash_attn_forward(q, k, v, causal=True)[0]

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    want = gradients_of(layer, q, k, v, dout)
    for got, gradient in zip(gradients_of(compiled, q, k, v, dout), want, strict=True):
        torch.testing.assert_close(got, gradient)
