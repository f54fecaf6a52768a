"""Which backend serves a call is asked for once, whoever serves it in the end."""

import pytest
import torch

from flash8 import backends, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash8.ops import attention as ops

pytest_plugins = ["driver_fixtures", "plan_cache_fixtures"]


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def dense(dtype=torch.bfloat16, **options):
    q, k, v = (torch.zeros(2, 40, 2, 64, dtype=dtype) for _ in "qkv")
    return lambda: flash_attn_func(q, k, v, **options)


def with_gradients():
    q, k, v = (torch.zeros(2, 40, 2, 64, requires_grad=True) for _ in "qkv")
    return flash_attn_func(q, k, v)


def packed_over_pages(seqlen_q=2, **options):
    q = torch.zeros(2 * seqlen_q, 2, 64).bfloat16()
    pages = [torch.zeros(9, 16, 2, 64).bfloat16() for _ in "kv"]
    lengths = {"seqused_k": int32([60, 3]), "page_table": torch.arange(8).view(2, 4).int()}
    ends = int32([0, seqlen_q, 2 * seqlen_q])
    return lambda: flash_attn_varlen_func(q, *pages, ends, None, seqlen_q, 64, **lengths, **options)


def cached(seqlen_q=2, **options):
    q = torch.zeros(2, seqlen_q, 2, 64).bfloat16()
    caches = [torch.zeros(2, 64, 2, 64).bfloat16() for _ in "kv"]
    return lambda: flash_attn_with_kvcache(q, *caches, cache_seqlens=int32([40, 3]), **options)


CALLS = {
    "forward kernel": dense(),
    "forward kernel with an output": dense(out=torch.empty(2, 40, 2, 64).bfloat16()),
    "no kernel": dense(torch.float32),
    "no kernel for an output": dense(
        out=torch.empty(2 * 40 * 2 * 64 + 1).bfloat16()[1:].view(2, 40, 2, 64)
    ),
    "no kernel for gradients": with_gradients,
    "dropout": dense(dropout_p=0.5),
    "dropout with a seed": dense(torch.float32, dropout_p=0.5, dropout_seed=3),
    "pages, decode kernel": packed_over_pages(),
    "pages, forward kernel": packed_over_pages(40),
    "pages, no kernel": packed_over_pages(num_splits=2),
    "cache, decode kernel": cached(),
    "cache, forward kernel": cached(40),
    "cache, no kernel": cached(num_splits=2),
    "cache, indices that are copied": cached(cache_batch_idx=torch.tensor([1, 0])),
    "new keys": cached(40, **{x: torch.zeros(2, 1, 2, 64).bfloat16() for x in "kv"}),
}


@pytest.mark.filterwarnings("ignore:flash8 has no compiled kernel")
@pytest.mark.parametrize("name", CALLS)
def test_it_is_asked_once(name, on_fake_driver, monkeypatch):
    asked = []
    forward_backend = backends.forward_backend

    def counted(*args):
        asked.append(args)
        return forward_backend(*args)

    monkeypatch.setattr("flash8._native.launch_forward", lambda *args: None)
    for module in (backends, ops):
        monkeypatch.setattr(module, "forward_backend", counted)
    CALLS[name]()
    assert len(asked) == 1


class Wide(torch.Tensor):
    """bf16 to whoever asks, and fp32 in the ops that it calls, as shards have other sizes."""

    @staticmethod
    def __new__(cls, inner):
        like = {"dtype": torch.bfloat16, "strides": inner.stride()}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **like)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*(x.inner if isinstance(x, Wide) else x for x in args), **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:flash8 has no compiled kernel")
@pytest.mark.parametrize("seqlen_q", [2, 40])
@pytest.mark.parametrize("over_cache", [False, True])
def test_a_subclass_is_served_by_what_its_op_is_given(over_cache, seqlen_q, fake, on_fake_driver):
    """No kernel takes the fp32 tensors, whatever one says of the outer ones."""
    inner = [torch.randn(1, n, 2, 64) for n in (seqlen_q, 40, 40)]
    call = flash_attn_with_kvcache if over_cache else flash_attn_func
    out = call(*(Wide(x) for x in inner))
    assert torch.equal(out, call(*inner)) and out.dtype == torch.float32
    assert not fake.launches
