"""method="all_gather": every rank gathers all keys, and attends with its queries.

Each query meets all of its keys in one call, so nothing is merged. K and V are gathered once more
in the backward: keeping them would cost what splitting a sequence is to save. dK and dV of all
tokens are summed over ranks in fp32.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from flash8.call.options import Options
from flash8.distributed import collectives, partial, plan
from flash8.distributed.layout import Batch


class Gathered(NamedTuple):
    """What the ranks of a group agree on for one call."""

    batch: Batch
    group: ProcessGroup
    options: Options

    def calls(self, q: Tensor) -> tuple[plan.Call, ...]:
        how = plan.How((self.options.window_left, self.options.window_right))
        return plan.gathered(self.batch, self.group.size(), self.group.rank(), how, q.device)

    def longest(self) -> int:
        return max(self.batch.counts(self.group.size()))

    def keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        both = collectives.gather(torch.cat((k, v), dim=-1), self.longest(), self.group)
        return both[..., : k.shape[-1]], both[..., k.shape[-1] :]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, how: Gathered
    ) -> tuple[Tensor, Tensor]:
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=partial.wide(q))
        all_k, all_v = how.keys(k, v)
        for call in how.calls(q):
            found = partial.forward(call, q, all_k, all_v, s_aux, how.options)
            partial.put(out, lse, call, *found)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, s_aux, out, lse)
        ctx.how = how
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, s_aux, out, lse = ctx.saved_tensors
        how: Gathered = ctx.how
        all_k, all_v = how.keys(k, v)
        dq = torch.zeros_like(q)
        shape = (len(all_k), k.shape[1], k.shape[2] + v.shape[2])
        dkv = q.new_zeros(shape, dtype=partial.wide(q))
        ds_aux = None if s_aux is None else torch.zeros_like(s_aux, dtype=lse.dtype)
        for call in how.calls(q):
            inputs = (q, all_k, all_v, s_aux)
            found = partial.backward(call, dout, dlse, inputs, out, lse, how.options)
            if call.q_rows is None:
                dq = found[0]
            else:
                dq.index_copy_(0, call.q_rows, found[0])
            partial.add_keys(dkv, call, found[1], found[2])
            if ds_aux is not None:
                ds_aux += found[3]
        own = collectives.scatter_sum(dkv, how.group)[: len(k)]
        dk, dv = own.to(k.dtype).split((k.shape[-1], v.shape[-1]), dim=-1)
        return dq, dk, dv, None if ds_aux is None else ds_aux.to(s_aux.dtype), None


def attend(
    q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, how: Gathered
) -> tuple[Tensor, Tensor]:
    """O (rows, heads, head_dim_v) and LSE (heads, rows) of this rank's packed queries."""
    found: tuple[Tensor, Tensor] = _Attention.apply(q, k, v, s_aux, how)
    return found
