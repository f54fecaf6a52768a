"""The 16-bit backward of an FP8 forward, on the dequantized operands.

P is recomputed from what the forward saw, so that its rows sum to 1. K enters without its mean mu:
every score of a row then lacks softmax_scale * q . mu, and so does the LSE that P is made with.
In exact arithmetic nothing changes; but O comes from an FP8 product, so that D = rowsum(dO * O)
does not quite cancel the sum of P dP, rowsum(dS) is not quite what it should be, and dQ = dS K
would collect that error times K's bias. What rowsum(dS) should be is known,

    rowsum(dS) = p_sink * D + (1 - p_sink) * dLSE        p_sink = exp(s_aux - LSE), 0 without a sink

so mu's exact share, softmax_scale * rowsum(dS) * mu, is added to dQ. With softcap rowsum(dS) is not
known (the derivative of tanh weighs it), and K stays as it is.
"""

import torch
from torch import Tensor

from flash8.call.options import Options
from flash8.tensors.tokens import Tokens

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    s_aux: Tensor | None,
    out: Tensor,
    lse: Tensor,
    options: Options,
) -> Gradients:
    """dq, dk, dv in O's dtype and ds_aux, from O and LSE of the FP8 forward."""
    rows = _Rows(q8, k8, options)
    q, k, v = rows.dequantized(q8, k8, v8, options)
    mean = options.k_mean  # what k lacks against the keys of the forward
    if options.softcap == 0.0:
        own = Tokens(options.cu_seqlens_k).finite_mean(k)
        k = k - Tokens(options.cu_seqlens_k).spread(own, k)
        mean = own if mean is None else own + mean
    # Rows of no sequence, and those that see nothing: what else they hold must not matter.
    empty = torch.isneginf(lse)
    centred_lse = lse
    if mean is not None:
        mean = rows.of_queries(mean)
        shift = rows.scale * rows.heads_first((q * mean).sum(dim=-1))
        centred_lse = torch.where(empty, lse, lse - shift)
    dtype = out.dtype
    dq, dk, dv, _, _ = torch.ops.flash8.backward(
        dout,
        dlse,
        q.to(dtype),
        k.to(dtype),
        v.to(dtype),
        None,
        None,
        out,
        centred_lse,
        *_plain(options),
    )
    p_sink = None if s_aux is None else rows.sink_share(s_aux, lse)
    d = None if p_sink is None else rows.row_sum(dout, out)
    if mean is not None:
        row_sum = _row_sum_of_ds(p_sink, d, dlse)
        if row_sum is not None:
            row_sum = row_sum.masked_fill(empty, 0.0)
            dq = (dq + rows.scale * rows.tokens_first(row_sum)[..., None] * mean).to(dtype)
    if s_aux is None or p_sink is None or d is None:
        return dq, dk, dv, None
    ds_aux = -(p_sink * (d if dlse is None else d - dlse)).masked_fill(empty, 0.0)
    return dq, dk, dv, ds_aux.transpose(-1, -2).flatten(0, -2).sum(dim=0).to(s_aux.dtype)


def tangents(
    given: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    q8: Tensor,
    k8: Tensor,
    v8: Tensor,
    s_aux: Tensor | None,
    lse: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Those of O and LSE, in fp32, from those of q, k, v and s_aux, passed straight through the
    rounding."""
    rows = _Rows(q8, k8, options)
    q, k, v = rows.dequantized(q8, k8, v8, options)
    if options.k_mean is not None:
        shared = options.k_mean.dim() == 2
        k = k + (
            options.k_mean if shared else Tokens(options.cu_seqlens_k).spread(options.k_mean, k)
        )
    *wide, sink = (None if x is None else x.float() for x in given)
    found: tuple[Tensor, Tensor] = torch.ops.flash8.jvp(
        *wide, None, sink, q, k, v, None, s_aux, lse, *_plain(options)
    )
    return found


def _plain(options: Options) -> Options:
    """Of a call on the dequantized operands."""
    return options._replace(
        q_descale=None, k_descale=None, v_descale=None, k_mean=None, v_mean=None
    )


def _row_sum_of_ds(p_sink: Tensor | None, d: Tensor | None, dlse: Tensor | None) -> Tensor | None:
    """What it is in exact arithmetic, in LSE's layout; None: 0."""
    if p_sink is None or d is None:
        return dlse
    return p_sink * d if dlse is None else p_sink * d + (1.0 - p_sink) * dlse


class _Rows:
    """Token layouts of one call: broadcasts from sequences and KV heads to the rows of q."""

    def __init__(self, q: Tensor, k: Tensor, options: Options) -> None:
        self._q, self._group = q, q.shape[-2] // k.shape[-2]
        self._tokens = Tokens(options.cu_seqlens_q)
        self.scale = options.scale(q)

    def of_queries(self, values: Tensor) -> Tensor:
        """(heads_kv, d) or (batch, heads_kv, d) so that it broadcasts over q."""
        values = values.repeat_interleave(self._group, dim=-2)
        return values if values.dim() == 2 else self._tokens.spread(values, self._q)

    def dequantized(
        self, q8: Tensor, k8: Tensor, v8: Tensor, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        """fp32 q, k without its mean, and all of v."""
        keys = Tokens(options.cu_seqlens_k)
        q = _scaled(q8, self._q_descale(options.q_descale), self._tokens)
        k, v = _scaled(k8, options.k_descale, keys), _scaled(v8, options.v_descale, keys)
        if options.v_mean is not None:
            shared = options.v_mean.dim() == 2
            v = v + (options.v_mean if shared else keys.spread(options.v_mean, v))
        return q, k, v

    def _q_descale(self, descale: Tensor | None) -> Tensor | None:
        per_kv_head = descale is not None and descale.dim() == 2
        if descale is None or not per_kv_head or descale.shape[1] == self._q.shape[-2]:
            return descale
        return descale.repeat_interleave(self._group, dim=1)

    def heads_first(self, rows: Tensor) -> Tensor:
        """(..., tokens, heads) in LSE's layout (..., heads, tokens)."""
        return rows.transpose(-1, -2)

    def tokens_first(self, rows: Tensor) -> Tensor:
        return rows.transpose(-1, -2)

    def sink_share(self, s_aux: Tensor, lse: Tensor) -> Tensor:
        """exp(s_aux - LSE) in LSE's layout: the weight of the sink. It has no meaning where a row
        is empty."""
        return (s_aux.float()[:, None] - lse).exp()

    def row_sum(self, dout: Tensor | None, out: Tensor) -> Tensor:
        """rowsum(dO * O) in LSE's layout."""
        if dout is None:
            return out.new_zeros((), dtype=torch.float32)
        return self.heads_first((dout.float() * out.float()).sum(dim=-1))


def _scaled(x8: Tensor, descale: Tensor | None, tokens: Tokens) -> Tensor:
    x = x8.float()
    return x if descale is None else x * tokens.spread_descale(descale, x)
