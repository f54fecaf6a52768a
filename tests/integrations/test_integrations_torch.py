"""PyTorch's attention functions on flash8: the context for any device, the provider for CUDA."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flash8 import flash_attn_with_kvcache
from flash8.integrations.torch import register, sdpa

BATCH, HEADS, SEQLEN_Q, SEQLEN_K, HEAD_DIM = 2, 4, 5, 7, 8


def qkv(
    seqlen_q=SEQLEN_Q, seqlen_k=SEQLEN_K, heads_kv=HEADS, dtype=torch.float64, requires_grad=True
):
    shapes = (HEADS, seqlen_q), (heads_kv, seqlen_k), (heads_kv, seqlen_k)
    return [
        torch.randn(BATCH, *shape, HEAD_DIM, dtype=dtype, requires_grad=requires_grad)
        for shape in shapes
    ]


def value_and_gradients(tensors, **options):
    out = F.scaled_dot_product_attention(*tensors, **options)
    gradients = torch.autograd.grad(out, tensors, torch.ones_like(out).cumsum(-1))
    return (out.detach(), *gradients)


def padding(kind, seqlen_k=SEQLEN_K):
    """(batch, seqlen_k), True for keys that count."""
    mask = torch.ones(BATCH, seqlen_k, dtype=torch.bool)
    mask[0] = {
        "left": torch.arange(seqlen_k) >= 3,
        "right": torch.arange(seqlen_k) < 3,
        "holes": torch.arange(seqlen_k) % 2 == 0,
        "nothing_left": torch.zeros(seqlen_k, dtype=torch.bool),
    }[kind]
    return mask


MASKS = {
    **{kind: padding(kind)[:, None, None] for kind in ("left", "right", "holes", "nothing_left")},
    "expanded": padding("left")[:, None, None].expand(-1, HEADS, SEQLEN_Q, -1),
    "one_for_all": padding("holes")[:1].view(1, 1, 1, -1),
    "two_dimensions": padding("holes")[:1],
    "all_true": torch.ones(1, SEQLEN_K, dtype=torch.bool),
}


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(scale=0.3),
        dict(is_causal=True),
        *(dict(attn_mask=mask) for mask in MASKS.values()),
    ],
    ids=["plain", "scale", "causal", *MASKS],
)
def test_served_calls_equal_torch(options):
    tensors = qkv()
    reference = value_and_gradients(tensors, **options)
    with sdpa(strict=True) as report:
        results = value_and_gradients(tensors, **options)
    assert report.served == 1 and not report.fallbacks
    for result, expected in zip(results, reference, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(5, 5), (1, 5), (3, 8)])
def test_is_causal_is_aligned_top_left(seqlen_q, seqlen_k):
    tensors = qkv(seqlen_q, seqlen_k)
    reference = value_and_gradients(tensors, is_causal=True)
    with sdpa(strict=True):
        results = value_and_gradients(tensors, is_causal=True)
    for result, expected in zip(results, reference, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


def test_grouped_heads_and_no_heads():
    tensors = qkv(heads_kv=2)
    reference = value_and_gradients(tensors, enable_gqa=True)
    with sdpa(strict=True):
        results = value_and_gradients(tensors, enable_gqa=True)
    for result, expected in zip(results, reference, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)
    q, k, v = (x.detach()[:, 0] for x in tensors)
    with sdpa(strict=True):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=padding("left")[:, None])
    reference = F.scaled_dot_product_attention(q, k, v, attn_mask=padding("left")[:, None])
    torch.testing.assert_close(out, reference, rtol=1e-10, atol=1e-12)


def test_dropout_keeps_the_mean_and_follows_the_generator():
    q, k = torch.zeros(1, 8, 64, 8), torch.zeros(1, 8, 256, 8)
    with sdpa(strict=True):
        torch.manual_seed(3)
        first = F.scaled_dot_product_attention(q, k, torch.ones_like(k), dropout_p=0.25)
        torch.manual_seed(3)
        second = F.scaled_dot_product_attention(q, k, torch.ones_like(k), dropout_p=0.25)
    assert torch.equal(first, second)
    assert first.mean().item() == pytest.approx(1.0, abs=0.01)
    assert 0.02 < first.std().item() < 0.06


def test_autocast_computes_in_its_dtype():
    q, k, v = qkv(dtype=torch.float32, requires_grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = F.scaled_dot_product_attention(q, k, v)
        with sdpa(strict=True):
            out = F.scaled_dot_product_attention(q, k, v)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)


FALLBACKS = {
    "top-left": (qkv(7, 5, requires_grad=False), dict(is_causal=True)),
    "hides keys from all queries alike": (
        qkv(requires_grad=False),
        dict(attn_mask=torch.ones(SEQLEN_Q, SEQLEN_K, dtype=torch.bool).tril()),
    ),
    "no bool mask": (qkv(requires_grad=False), dict(attn_mask=torch.zeros(1, SEQLEN_K).double())),
    "scale -1.0": (qkv(requires_grad=False), dict(scale=-1.0)),
    "broadcast": ([x[:1] if i else x for i, x in enumerate(qkv(requires_grad=False))], {}),
    "a tensor is empty": (qkv(0, requires_grad=False), {}),
    "head_dim is greater than 512": ([torch.randn(1, 1, 2, 520)] * 3, {}),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_other_calls_go_to_torch_with_a_reason(reason):
    tensors, options = FALLBACKS[reason]
    expected = F.scaled_dot_product_attention(*tensors, **options)
    with sdpa() as report:
        out = F.scaled_dot_product_attention(*tensors, **options)
    assert torch.equal(out, expected)
    assert report.served == 0
    assert len(report.fallbacks) == 1 and reason in next(iter(report.fallbacks))
    with pytest.raises(ValueError, match=reason.replace("(", r"\(")), sdpa(strict=True):
        F.scaled_dot_product_attention(*tensors, **options)


def test_a_subclass_keeps_its_own_function():
    class Marked(torch.Tensor):
        pass

    q = torch.randn(1, 1, 2, 8).as_subclass(Marked)
    with sdpa() as report:
        out = F.scaled_dot_product_attention(q, q, q)
    assert type(out) is Marked and report.served == 0


def test_modules_inside_the_context():
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    expected, _ = attention(x, x, x, need_weights=False)
    with sdpa() as report:
        out, _ = attention(x, x, x, need_weights=False)
    torch.testing.assert_close(out, expected)
    assert report.fallbacks["the call is inside nn.MultiheadAttention"] == 1


def test_nested_contexts_and_leaving():
    q, k, v = qkv(requires_grad=False)
    with sdpa() as outer, sdpa() as inner:
        F.scaled_dot_product_attention(q, k, v)
        F.scaled_dot_product_attention(q, k, v, scale=-1.0)
    F.scaled_dot_product_attention(q, k, v)
    assert (outer.served, inner.served) == (0, 1)
    assert outer.fallbacks.total() == inner.fallbacks.total() == 1


def test_torch_compile_traces_the_context():
    q, k, v = qkv(requires_grad=False)

    def layer(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) + 1

    expected = layer(q, k, v)
    compiled = torch.compile(layer, backend="eager")
    with sdpa(strict=True):
        out = compiled(q, k, v)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


# The provider. PyTorch reaches it from its CUDA kernels only, so here the same glue is put behind
# the CPU key and its check for a Hopper GPU is lifted; everything else is what runs on CUDA.


@pytest.fixture
def active():
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        pytest.skip("torch is older than 2.11")
    torch.nn.attention.activate_flash_attention_impl(register())
    yield
    torch.nn.attention.restore_flash_attention_impl()


@pytest.fixture
def on_cpu(active, monkeypatch):
    from torch.nn.attention import _fa3

    for check in ("_fa3_forward_support_error", "_fa3_backward_support_error"):
        monkeypatch.setattr(_fa3, check, lambda *args: None)
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name, function in {
            "_flash_attention_forward": _fa3._fa3_flash_attention_forward_impl_default,
            "_flash_attention_backward": _fa3._fa3_flash_attention_backward_impl,
            "_flash_attention_forward_no_dropout_inplace": (
                _fa3._fa3_flash_attention_forward_no_dropout_inplace_impl
            ),
            "_scaled_dot_product_flash_attention": (
                _fa3._fa3_scaled_dot_product_flash_attention_forward_impl_default
            ),
            "_scaled_dot_product_flash_attention_backward": (
                _fa3._fa3_scaled_dot_product_flash_attention_backward_impl
            ),
        }.items():
            library.impl(name, function, "CPU")
        yield


BF16 = dict(rtol=2e-2, atol=2e-2)


def test_activation_and_restoration(active):
    attention = torch.nn.attention
    assert register() in attention.list_flash_attention_impls()
    assert attention.current_flash_attention_impl() == register()
    attention.restore_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None
    attention.activate_flash_attention_impl(register())


def test_cpu_calls_are_unchanged_while_active(active):
    q, k, v = qkv(requires_grad=False)
    expected = F.scaled_dot_product_attention(q.clone(), k, v)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads_kv", [HEADS, 2])
def test_sdpa_flash_kernel(on_cpu, is_causal, heads_kv):
    tensors = qkv(6, 6, heads_kv, dtype=torch.bfloat16)
    out, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        *tensors, dropout_p=0.0, is_causal=is_causal, scale=0.3
    )
    assert out.shape == tensors[0].shape and out.stride() == tensors[0].stride()
    gradients = torch.autograd.grad(out, tensors, torch.ones_like(out).cumsum(-1))
    reference = value_and_gradients(
        [x.detach().float().requires_grad_() for x in tensors],
        is_causal=is_causal,
        scale=0.3,
        enable_gqa=True,
    )
    for result, expected in zip((out, *gradients), reference, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(result.float() / scale, expected / scale, **BF16)


LENGTHS_Q, LENGTHS_K = (3, 1, 5), (4, 6, 5)


def packed(lengths, heads, dtype=torch.bfloat16):
    return torch.randn(sum(lengths), heads, HEAD_DIM, dtype=dtype, requires_grad=True)


def boundaries(lengths):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def reference_varlen(q, k, v, window=(-1, -1), lengths_k=LENGTHS_K):
    """Sequence by sequence, bottom-right aligned, in fp32."""
    outputs = []
    sequences = zip(*(x.float().split(n) for x, n in ((q, LENGTHS_Q), (k, lengths_k))), strict=True)
    for (q_i, k_i), v_i in zip(sequences, v.float().split(lengths_k), strict=True):
        position = torch.arange(len(q_i))[:, None] + len(k_i) - len(q_i)
        distance = position - torch.arange(len(k_i))
        visible = torch.ones_like(distance, dtype=torch.bool)
        visible &= (window[0] < 0) | (distance <= window[0])
        visible &= (window[1] < 0) | (-distance <= window[1])
        q_i, k_i, v_i = (x.transpose(0, 1) for x in (q_i, k_i, v_i))
        out = F.scaled_dot_product_attention(q_i, k_i, v_i, visible, enable_gqa=True)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (1, 1)])
def test_varlen_attn(on_cpu, window):
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    tensors = packed(LENGTHS_Q, 4), packed(LENGTHS_K, 2), packed(LENGTHS_K, 2)
    out, lse = varlen_attn(
        *tensors,
        boundaries(LENGTHS_Q),
        boundaries(LENGTHS_K),
        max(LENGTHS_Q),
        max(LENGTHS_K),
        window_size=window,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    assert lse.shape == (4, sum(LENGTHS_Q)) and lse.dtype == torch.float32
    expected = reference_varlen(*tensors, window)
    torch.testing.assert_close(out.float(), expected, **BF16)
    grad = torch.randn_like(expected)
    ours = torch.autograd.grad(out, tensors, grad.bfloat16())
    theirs = torch.autograd.grad(expected, tensors, grad)
    for result, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(result.float(), reference.float(), rtol=5e-2, atol=5e-2)


def test_varlen_attn_over_a_paged_cache(on_cpu):
    from torch.nn.attention.varlen import varlen_attn, varlen_attn_out

    page_size, used = 4, torch.tensor(LENGTHS_K, dtype=torch.int32)
    pages = torch.randperm(6).int().view(3, 2)
    q = packed(LENGTHS_Q, 4).detach()
    k_pool, v_pool = torch.randn(2, 6, page_size, 2, HEAD_DIM).bfloat16()
    k, v = (
        torch.cat([x[pages[i].long()].flatten(0, 1)[:n] for i, n in enumerate(LENGTHS_K)])
        for x in (k_pool, v_pool)
    )
    arguments = (boundaries(LENGTHS_Q), None, max(LENGTHS_Q), 2 * page_size)
    options = dict(window_size=(-1, 0), enable_gqa=True, seqused_k=used, block_table=pages)
    out = varlen_attn(q, k_pool, v_pool, *arguments, **options)
    torch.testing.assert_close(out.float(), reference_varlen(q, k, v, (-1, 0)), **BF16)
    written = torch.empty_like(out)
    varlen_attn_out(written, q, k_pool, v_pool, *arguments, num_splits=1, **options)
    assert torch.equal(written, out)


def test_float8_forward(on_cpu):
    from torch.nn.attention import _fa3

    q, k, v = (torch.randn(2, 6, 4, 16).to(torch.float8_e4m3fn) for _ in range(3))
    descales = [torch.full((2, 4), value) for value in (0.5, 2.0, 0.25)]
    out, lse = _fa3._fa3_run_forward(
        q, k, v, None, None, 6, 6, None, True, -1, -1, None, None, *descales
    )
    dense = [x.float() * d for x, d in zip((q, k, v), (0.5, 2.0, 0.25), strict=True)]
    q, k, v = (x.transpose(1, 2) for x in dense)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    assert out.dtype == torch.bfloat16 and lse.shape == (2, 4, 6)
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


def test_the_op_appends_as_the_function_does(active):
    q, k, v = (x.transpose(1, 2) for x in qkv(6, 6, dtype=torch.bfloat16, requires_grad=False))
    fwd = torch.ops.flash_attn_3.fwd
    assert fwd(q, k, v)[0].shape == q.shape
    used, new = torch.tensor([2, 0], dtype=torch.int32), torch.randn_like(k[:, :3])
    caches = [[x.clone() for x in (k, v)] for _ in range(2)]
    out, lse, _, _ = fwd(q, *caches[0], new, -new, seqused_k=used, is_causal=True, num_splits=1)
    want, want_lse, *_ = flash_attn_with_kvcache(
        q, *caches[1], new, -new, cache_seqlens=used, causal=True, return_softmax_lse=True
    )
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert torch.equal(caches[0][1], caches[1][1]) and not torch.equal(caches[0][1], v)


def test_another_provider_of_the_same_ops_is_refused(active):
    from flash8.integrations.torch import fa3_ops

    with pytest.raises(RuntimeError, match="already defined by another package"):
        fa3_ops._define()
