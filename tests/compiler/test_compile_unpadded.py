"""torch.compile of calls whose ints come out of tensors: unpad, attend, pad in one graph."""

import pytest
import torch

import flash8
from flash8 import varlen

MASK = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7, [1, 0, 0, 0, 0, 0, 0]])


@pytest.fixture(autouse=True)
def _captured_scalars():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        yield
    torch._dynamo.reset()


def unpadded(x, mask):
    packed, indices, ends, longest, _ = varlen.unpad_input(x, mask)
    out = flash8.flash_attn_varlen_func(
        packed, packed, packed, ends, ends, longest, longest, causal=True
    )
    return varlen.pad_input(out, indices, *x.shape[:2])


def with_longest_of_lengths(x, mask):
    packed, indices, ends, _, _ = varlen.unpad_input(x, mask)
    longest = varlen.max_seqlen_of(ends)
    out = flash8.flash_attn_varlen_qkvpacked_func(
        torch.stack((packed, packed, packed), 1), ends, longest, window_size=(longest, 0)
    )
    return varlen.pad_input(out, indices, *x.shape[:2])


def cross(x, mask):
    """Keys and values are unpadded by themselves, so that nothing says that they are as many."""
    packed, indices, ends, longest, _ = varlen.unpad_input(x, mask)
    k, _, k_ends, k_longest, used = varlen.unpad_input(x[:, :5] * 2, mask[:, :5])
    v = varlen.unpad_input(x[:, :5] * 3, mask[:, :5])[0]
    out = flash8.flash_attn_varlen_func(
        packed, k, v, ends, k_ends, longest, k_longest, seqused_k=used
    )
    return varlen.pad_input(out, indices, *x.shape[:2])


def fp8(x, mask):
    packed, indices, ends, longest, _ = varlen.unpad_input(x, mask)
    out = flash8.fp8.fp8_attention(
        packed,
        packed,
        packed,
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
    )
    return varlen.pad_input(out, indices, *x.shape[:2])


def numbers(x, mask):
    """Every int of a call that shapes do not depend on."""
    n = mask.sum().item()
    return flash8.flash_attn_func(x, x, x, window_size=(n, n), attention_chunk=n, sm_margin=n)


def a_cache(x, mask):
    n = mask[0].sum().item()
    x = x.detach()
    cache = torch.zeros(3, 16, *x.shape[2:])
    new = x[:, :1]
    return flash8.flash_attn_with_kvcache(
        new, cache, cache.clone(), new, new, cache_seqlens=n, causal=True, num_splits=1
    )


def slow(*row):
    return pytest.param(*row, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "model,dynamic",
    [
        (unpadded, None),
        (numbers, None),
        (a_cache, None),
        slow(unpadded, True),
        slow(with_longest_of_lengths, True),
        slow(cross, True),
        slow(cross, None),
        slow(fp8, None),
        slow(fp8, True),
    ],
)
def test_one_graph(model, dynamic):
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    x, other = torch.randn(3, 7, 2, 16), MASK.clone()
    other[0, 3:5] = 1
    for mask in (MASK, other):
        results = []
        for run in (model, compiled):
            leaf = x.clone().requires_grad_()
            out = run(leaf, mask)
            gradients = torch.autograd.grad(out.square().sum(), leaf) if out.requires_grad else ()
            results.append((out, *gradients))
        torch.testing.assert_close(*results)


@pytest.mark.slow
def test_a_module_with_padding():
    module = flash8.nn.FlashMHA(32, 2, causal=True, rotary_dim=16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, padding = torch.randn(3, 7, 32), MASK == 0
    torch.testing.assert_close(
        compiled(x, key_padding_mask=padding), module(x, key_padding_mask=padding)
    )


def test_limits_become_assertions_of_the_graph():
    def run(x, n):
        return flash8.flash_attn_func(x, x, x, window_size=(n.item(), 0))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 4, 1, 8)
    torch.testing.assert_close(compiled(x, torch.tensor(2)), run(x, torch.tensor(2)))
    with pytest.raises(RuntimeError):
        compiled(x, torch.tensor(-5))


def test_what_a_trace_knows_is_refused_while_tracing():
    x = torch.randn(1, 4, 1, 8)
    compiled = torch.compile(
        lambda x: flash8.flash_attn_func(x, x, x, attention_chunk=-1), backend="eager"
    )
    with pytest.raises(ValueError, match="attention_chunk must be an integer"):
        compiled(x)
