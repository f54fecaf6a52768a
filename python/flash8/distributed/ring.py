"""method="ring": K and V travel from rank to rank, and every rank attends to what has come.

In step s rank r has the keys of rank r - s. While it attends to them they are on their way to the
next rank, and those of rank r - s - 1 on their way here. What the steps find is merged by LSE, the
sink last. In the backward dK and dV travel along with their keys, in fp32: each rank adds its
share, and after the last step they go home.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from flash8.call.options import Options
from flash8.distributed import partial, plan
from flash8.distributed.collectives import Passing
from flash8.distributed.layout import Batch
from flash8.distributed.merge import Merged, sink_gradient


class Ring(NamedTuple):
    """What the ranks of a group agree on for one call."""

    batch: Batch
    group: ProcessGroup
    options: Options

    @property
    def window(self) -> plan.Window:
        return self.options.window_left, self.options.window_right

    def steps(self) -> int:
        return plan.ring_steps(self.batch, self.group.size(), self.window)

    def source(self, step: int) -> int:
        """Whose keys are here in this step."""
        return (self.group.rank() - step) % self.group.size()

    def calls(self, step: int, q: Tensor) -> tuple[plan.Call, ...]:
        group = self.group
        how = plan.How(self.window)
        return plan.around(self.batch, group.size(), group.rank(), how, q.device)[step]

    def count(self, step: int) -> int:
        return self.batch.counts(self.group.size())[self.source(step)]

    def pass_on(self, x: Tensor, step: int) -> Passing | None:
        """Sends what is here in this step; None after the last."""
        if step + 1 == self.steps():
            return None
        return Passing(x, self.count(step + 1), self.group)

    def send_home(self, x: Tensor) -> Tensor:
        """From the rank that has seen them last to the rank of these keys."""
        back = 1 - self.steps()
        return x if back == 0 else Passing(x, self.count(0), self.group, back).wait()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, how: Ring
    ) -> tuple[Tensor, Tensor]:
        wide = partial.wide(q)
        merged = Merged(
            q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=wide),
            q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=wide),
        )
        both = torch.cat((k, v), dim=-1)
        for step in range(how.steps()):
            coming = how.pass_on(both, step)
            here_k, here_v = both.split((k.shape[-1], v.shape[-1]), dim=-1)
            for call in how.calls(step, q):
                found = partial.forward(call, q, here_k, here_v, None, how.options)
                merged.add(call.q_rows, *found)
            if coming is not None:
                both = coming.wait()
        out, lse = merged.finish(s_aux, q.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, s_aux, out, lse)
        ctx.how = how
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, s_aux, out, lse = ctx.saved_tensors
        how: Ring = ctx.how
        widths = (k.shape[-1], v.shape[-1])
        dq = torch.zeros_like(q, dtype=partial.wide(q))
        both, arriving = torch.cat((k, v), dim=-1), None
        for step in range(how.steps()):
            coming = how.pass_on(both, step)
            here_k, here_v = both.split(widths, dim=-1)
            dkv = torch.zeros_like(both, dtype=dq.dtype)
            for call in how.calls(step, q):
                inputs = (q, here_k, here_v, None)
                found = partial.backward(call, dout, dlse, inputs, out, lse, how.options)
                partial.add_queries(dq, call, found[0])
                partial.add_keys(dkv, call, found[1], found[2])
            if arriving is not None:
                dkv += arriving.wait()
            arriving = how.pass_on(dkv, step)
            if coming is not None:
                both = coming.wait()
        dk, dv = how.send_home(dkv).split(widths, dim=-1)
        ds_aux = None if s_aux is None else sink_gradient(s_aux, dout, dlse, out, lse)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), ds_aux, None


def attend(
    q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, how: Ring
) -> tuple[Tensor, Tensor]:
    """O (rows, heads, head_dim_v) and LSE (heads, rows) of this rank's packed queries."""
    found: tuple[Tensor, Tensor] = _Attention.apply(q, k, v, s_aux, how)
    return found
