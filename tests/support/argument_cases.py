"""Arguments of calls that are valid until a test changes one, and the words of a refusal."""

import re

import pytest
import torch

import flash8
from cases import int32


def ones(*shape, dtype=torch.float32, **kwargs):
    return torch.ones(*shape, dtype=dtype, **kwargs)


def grad(*shape):
    return torch.randn(*shape, requires_grad=True)


def refuses(call, arguments, error, *texts):
    with pytest.raises((TypeError, ValueError)) as caught:
        call(**arguments)
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {caught.value}"
    message = str(caught.value)
    for text in texts:
        pattern = rf"(?<!\w){re.escape(text)}(?!\w)" if text[0].isalnum() else re.escape(text)
        assert re.search(pattern, message), f"{text!r} is not in {message!r}"


def cache(**changes):
    """A valid flash_attn_with_kvcache call with append and rotary, with `changes`."""
    arguments = dict(
        q=torch.randn(2, 3, 4, 32),
        k_cache=torch.randn(2, 20, 2, 32),
        v_cache=torch.randn(2, 20, 2, 8),
        k=torch.randn(2, 3, 2, 32),
        v=torch.randn(2, 3, 2, 8),
        rotary_cos=torch.randn(24, 8),
        rotary_sin=torch.randn(24, 8),
        cache_seqlens=int32([5, 17]),
    )
    arguments.update(changes)
    return _unchanged_on_refusal(arguments)


def pages(**changes):
    arguments = dict(
        q=torch.randn(2, 3, 4, 32),
        k_cache=torch.randn(9, 4, 2, 32),
        v_cache=torch.randn(9, 4, 2, 8),
        k=torch.randn(2, 3, 2, 32),
        v=torch.randn(2, 3, 2, 8),
        page_table=int32([[0, 8, 1, 3], [4, 5, 6, 7]]),
        cache_seqlens=int32([5, 13]),
    )
    arguments.update(changes)
    return _unchanged_on_refusal(arguments)


def _unchanged_on_refusal(arguments):
    caches = [arguments[n] for n in ("k_cache", "v_cache")]
    before = [x.clone() if isinstance(x, torch.Tensor) and x.numel() else None for x in caches]
    try:
        return flash8.flash_attn_with_kvcache(**arguments)
    except (TypeError, ValueError):
        for x, old in zip(caches, before, strict=True):
            if old is not None and x.device.type == "cpu":
                assert torch.equal(x.float(), old.float()), "the cache changed before the refusal"
        raise
