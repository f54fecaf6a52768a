"""The peers of an attention benchmark: each is a callable on (batch, heads, seqlen, head_dim)."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True)
class Peer:
    """A named implementation. `call(q, k, v, causal)` takes and returns (b, h, s, d)."""

    name: str
    call: Attention


_SDPA_BACKENDS: Mapping[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch_flash": SDPBackend.FLASH_ATTENTION,
    "unfused": SDPBackend.MATH,
}


def _sdpa(backend: SDPBackend) -> Attention:
    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )

    return call


def _tokens_first(function: Callable[..., Tensor]) -> Attention:
    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        tokens = (x.transpose(1, 2) for x in (q, k, v))
        return function(*tokens, causal=causal).transpose(1, 2)

    return call


def peers(device: str) -> Iterator[Peer]:
    """flash8 and everything else that this machine has."""
    import flash8

    yield Peer("flash8", _tokens_first(flash8.flash_attn_func))
    for name, backend in _SDPA_BACKENDS.items():
        if device == "cuda" or name != "cudnn":
            yield Peer(name, _sdpa(backend))
    if device == "cuda" and importlib.util.find_spec("flash_attn_interface") is not None:
        import flash_attn_interface

        yield Peer("flash_attn_3", _tokens_first(flash_attn_interface.flash_attn_func))


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The first rows' worth of truth: float32, materialised, for a correctness check."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.float(), *(x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        seqlen_q, seqlen_k = scores.shape[-2:]
        seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(~seen.tril(seqlen_k - seqlen_q), float("-inf"))
    return scores.softmax(-1) @ v
