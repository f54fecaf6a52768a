"""One call of a plan: forward, backward, and where its rows go."""

import torch
from torch import Tensor

from flash8.call.options import Options
from flash8.distributed.plan import Call

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def wide(x: Tensor) -> torch.dtype:
    """What is summed over ranks is summed in this."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """O (rows, heads, head_dim_v) and LSE (heads, rows) of the call's queries."""
    found = torch.ops.flash8.forward(
        rows(q, call.q_rows),
        rows(k, call.k_rows),
        rows(v, call.k_rows),
        None,
        s_aux,
        *options_of(call, options),
    )
    return found[0], found[1]


def backward(
    call: Call,
    dout: Tensor | None,
    dlse: Tensor | None,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    out: Tensor,
    lse: Tensor,
    options: Options,
) -> Gradients:
    """dq of the call's queries, dk and dv of its keys, and ds_aux, empty without a sink. out and
    lse, of all rows, may be those of more keys than the call has."""
    q, k, v, s_aux = inputs
    dq, dk, dv, _, ds_aux = torch.ops.flash8.backward(
        None if dout is None else rows(dout, call.q_rows),
        None if dlse is None else columns(dlse, call.q_rows),
        rows(q, call.q_rows),
        rows(k, call.k_rows),
        rows(v, call.k_rows),
        None,
        s_aux,
        rows(out, call.q_rows),
        columns(lse, call.q_rows),
        *options_of(call, options),
    )
    return dq, dk, dv, ds_aux


def options_of(call: Call, options: Options) -> Options:
    left, right = call.window
    return options._replace(
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k,
        max_seqlen_q=call.max_seqlen_q,
        max_seqlen_k=call.max_seqlen_k,
        causal=False,  # the window says it
        window_left=left,
        window_right=right,
    )


def rows(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def columns(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(1, index)


def put(out: Tensor, lse: Tensor, call: Call, own_out: Tensor, own_lse: Tensor) -> None:
    """What a call has found, into all rows."""
    if call.q_rows is None:
        out.copy_(own_out)
        lse.copy_(own_lse)
    else:
        out.index_copy_(0, call.q_rows, own_out)
        lse.index_copy_(1, call.q_rows, own_lse)


def add_queries(total: Tensor, call: Call, dq: Tensor) -> None:
    """total (rows, heads, head_dim) += dq."""
    if call.q_rows is None:
        total += dq
    else:
        total.index_add_(0, call.q_rows, dq.to(total.dtype))


def add_keys(total: Tensor, call: Call, dk: Tensor, dv: Tensor) -> None:
    """total (rows of the buffer, heads_kv, head_dim + head_dim_v) += dk and dv. Part by part, in
    which no row is twice: the order of additions, hence the sum, is always the same."""
    both = torch.cat((dk, dv), dim=-1).to(total.dtype)
    for index, part in zip(call.k_rows.split(call.k_parts), both.split(call.k_parts), strict=True):
        total.index_add_(0, index, part)
