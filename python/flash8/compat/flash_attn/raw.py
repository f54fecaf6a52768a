"""FlashAttention-2's forward and backward by themselves, which ring attention is built from.

They are plain functions with every argument named: frameworks read the signatures. A forward
returns (O, LSE, S_dmask, rng_state); rng_state, int64 (2,), is what the backward needs to drop the
same weights again.
"""

from typing import Any

import torch
from torch import Tensor

from flash8.compat import raw
from flash8.compat.arguments import bound, length
from flash8.compat.probabilities import signed_probabilities
from flash8.tensors.philox import draw_seed

Forward = tuple[Tensor, Tensor, Tensor, Tensor]


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> Forward:
    options = _options(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes
    )
    seed = draw_seed(q.device) if dropout_p > 0.0 else None
    out, lse, _, _ = raw.forward(q, k, v, **options, **_dropout(dropout_p, seed))
    probabilities = q.new_empty((0,))
    if return_softmax and seed is not None:
        longest = (q.shape[1], k.shape[1])
        probabilities = _probabilities(q, k, None, longest, seed, dropout_p, options)
    return out, lse, probabilities, _rng_state(q, seed)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> Forward:
    """zero_tensors has no effect: every row is written."""
    options = _options(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes
    )
    longest = (length(max_seqlen_q), length(max_seqlen_k))
    seed = draw_seed(q.device) if dropout_p > 0.0 else None
    out, lse, _, _ = raw.forward(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=longest[0],
        max_seqlen_k=longest[1],
        leftpad_k=leftpad_k,
        num_splits=num_splits,
        **key_lengths(cu_seqlens_k, seqused_k, block_table),
        **options,
        **_dropout(dropout_p, seed),
    )
    probabilities = q.new_empty((0,))
    if return_softmax and seed is not None:
        cu_seqlens = (cu_seqlens_q, cu_seqlens_k)
        probabilities = _probabilities(q, k, cu_seqlens, longest, seed, dropout_p, options)
    return out, lse, probabilities, _rng_state(q, seed)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes dq, dk and dv. Returns the row sums of dout * out, in the layout of softmax_lse."""
    options = _options(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes
    )
    options |= _dropout(dropout_p, _seed(dropout_p, rng_state))
    options["deterministic"] = bool(deterministic)
    return raw.backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), **options)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """As `_flash_attn_backward`."""
    options = _options(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes
    )
    options |= _dropout(dropout_p, _seed(dropout_p, rng_state))
    options |= {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": length(max_seqlen_q),
        "max_seqlen_k": length(max_seqlen_k),
        "deterministic": bool(deterministic),
    }
    return raw.backward(dout, q, k, v, out, softmax_lse, (dq, dk, dv), **options)


_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


def key_lengths(
    cu_seqlens_k: Tensor, seqused_k: Tensor | None, block_table: Tensor | None
) -> dict[str, Any]:
    """With pages FlashAttention-2 takes the lengths of the keys from cu_seqlens_k."""
    if block_table is None:
        return {"cu_seqlens_k": cu_seqlens_k, "seqused_k": seqused_k}
    used = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    return {"seqused_k": used, "page_table": block_table}


def _options(
    softmax_scale: float | None,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    return {
        "softmax_scale": softmax_scale,
        "causal": bool(causal),
        "window_left": bound(window_left),
        "window_right": bound(window_right),
        "softcap": max(softcap, 0.0),
        "alibi_slopes": alibi_slopes,
    }


def _dropout(dropout_p: float, seed: Tensor | None) -> dict[str, Any]:
    return {"dropout_p": dropout_p, "dropout_seed": seed}


def _seed(dropout_p: float, rng_state: Tensor | None) -> Tensor | None:
    if dropout_p == 0.0:
        return None
    if rng_state is None:
        raise ValueError(
            f"rng_state must be the forward's with dropout_p = {dropout_p}, got None: without it "
            "other weights would be dropped"
        )
    return rng_state[:1]


def _rng_state(q: Tensor, seed: Tensor | None) -> Tensor:
    if seed is None:
        return torch.zeros(2, dtype=torch.int64, device=q.device)
    return torch.cat((seed, torch.zeros_like(seed)))


def _probabilities(
    q: Tensor,
    k: Tensor,
    cu_seqlens: tuple[Tensor, Tensor] | None,
    longest: tuple[int, int],
    seed: Tensor,
    dropout_p: float,
    options: dict[str, Any],
) -> Tensor:
    left, right = options["window_left"], options["window_right"]
    public = {name: x for name, x in options.items() if not name.startswith("window")}
    public["window_size"] = (left, right)
    return signed_probabilities(q, k, cu_seqlens, longest, seed, dropout_p, public).to(q.dtype)
