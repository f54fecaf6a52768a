"""Merging the partial results of KV splits: each weighs exp(LSE_split - LSE)."""

import torch
from torch import Tensor

_MINUS_INF = float("-inf")


def combine(
    out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """O (..., d) and LSE (...) from partials (splits, ..., d) and (splits, ...)."""
    out = out_partial.new_empty(out_partial.shape[1:], dtype=out_dtype or out_partial.dtype)
    lse = lse_partial.new_empty(lse_partial.shape[1:])
    combine_into(out, lse.transpose(-1, -2), out_partial, lse_partial)
    return out, lse


def combine_into(out: Tensor, lse: Tensor, out_partial: Tensor, lse_partial: Tensor) -> None:
    """Fills out (..., rows, heads, d) and lse (..., heads, rows), one split at a time."""
    total, weights = _weights(lse_partial)
    merged = torch.zeros(out_partial.shape[1:], dtype=out_partial.dtype, device=out.device)
    for weight, partial in zip(weights, out_partial, strict=True):
        merged += torch.where(weight[..., None] == 0.0, 0.0, weight[..., None] * partial)
    out.copy_(merged)
    lse.copy_(total.transpose(-1, -2))


def combine_backward(
    dout: Tensor | None, dlse: Tensor | None, out_partial: Tensor, lse_partial: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `combine`: with w the weights, dO_split = w dO and
    dLSE_split = w (dO . (O_split - O) + dLSE)."""
    _, weights = _weights(lse_partial)
    d_out_partial = torch.zeros_like(out_partial)
    d_lse_partial = torch.zeros_like(lse_partial)
    if dout is not None:
        dout = dout.to(out_partial.dtype)
        d_out_partial = weights[..., None] * dout
        alignment = (dout * out_partial).sum(-1)  # (splits, ...)
        d_lse_partial = weights * (alignment - (weights * alignment).sum(0))
    if dlse is not None:
        d_lse_partial = d_lse_partial + weights * dlse
    return d_out_partial, d_lse_partial


def combine_jvp(
    out_tangent: Tensor | None,
    lse_tangent: Tensor | None,
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Tangents of O and LSE: with w the weights and dots for tangents, LSE' = sum of w LSE_split'
    and O' = sum of w (O_split' + (LSE_split' - LSE') O_split)."""
    _, weights = _weights(lse_partial)
    found = torch.zeros_like(out_partial) if out_tangent is None else out_tangent
    row = torch.zeros_like(lse)
    if lse_tangent is not None:
        row = _weighed(weights, lse_tangent)
        found = found + (lse_tangent - row)[..., None] * out_partial
    return _weighed(weights[..., None], found).to(out.dtype), row


def _weighed(weights: Tensor, x: Tensor) -> Tensor:
    """The sum over splits, of those that have seen a key."""
    return torch.where(weights == 0.0, 0.0, weights * x).sum(dim=0)


def _weights(lse_partial: Tensor) -> tuple[Tensor, Tensor]:
    """LSE over all splits, and exp(LSE_split - LSE), 0 where a split has seen no key."""
    lse = torch.logsumexp(lse_partial, dim=0)
    finite = torch.where(lse == _MINUS_INF, 0.0, lse)
    return lse, (lse_partial - finite).exp()
