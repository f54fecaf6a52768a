"""A forward and a backward without autograd, which frameworks call to build their own from."""

from typing import Any

import torch
from torch import Tensor

from flash8.call import checks
from flash8.call.options import Options
from flash8.ops import attention as ops
from flash8.ops.outputs import ForwardResult


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    out: Tensor | None = None,
    **options: Any,
) -> ForwardResult:
    """options: fields of `Options`."""
    geometry, checked = checks.attention(q, k, v, qv, None, out, Options(**options))
    checked = ops.resolve_num_splits(q, geometry, checked)
    return ops.run_forward(q, k, v, qv, None, out, checked)


@torch.no_grad()
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    **options: Any,
) -> Tensor:
    """Writes the gradients of q, k and v to those of `gradients` that are given.

    out and lse may be those of more keys than k has (ring attention). Returns the row sums of
    dout * out, in the layout of lse.
    """
    _, checked = checks.attention(q, k, v, None, None, None, Options(**options))
    computed = torch.ops.flash8.backward(dout, None, q, k, v, None, None, out, lse, *checked)
    for given, gradient in zip(gradients, computed, strict=False):
        if given is not None:
            given.copy_(gradient)
    return (dout.float() * out.float()).sum(-1).transpose(-1, -2).contiguous()
