"""Matrix products in which what the mask hides counts for nothing, whatever it holds.

Weights (P, dS) are zero where the mask hides the key, but 0 * NaN is NaN, and a key that is hidden
from one query of a tile may be visible to its neighbour. Products are made as if all values were
finite; only where one comes out otherwise are the values that are not finite taken by themselves,
for the queries that see them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Matmul = Callable[[Tensor, Tensor], Tensor]


def select(x: Tensor, hidden: Tensor | None) -> Tensor:
    """x (..., M, N) with 0 where hidden (M, N), in place; None hides nothing."""
    return x if hidden is None else x.masked_fill_(hidden, 0.0)


def transposed(hidden: Tensor | None) -> Tensor | None:
    """The mask of a product over the rows of a tile."""
    return None if hidden is None else hidden.transpose(-1, -2)


def product(
    weights: Tensor, values: Tensor, hidden: Tensor | None, matmul: Matmul = torch.matmul
) -> Tensor:
    """weights (..., M, N) @ values (..., N, d), or `matmul` of both, which may add to something.

    hidden: bool (M, N), or smaller with sides that divide M and N: stacked heads of a group share
    a mask. Weights are zero there.
    """
    found = matmul(weights, values)
    if hidden is None or bool(found.isfinite().all()):
        return found
    finite = values.isfinite().all(dim=-1, keepdim=True)
    found = matmul(weights, values.where(finite, 0.0))
    hidden = hidden.repeat(
        weights.shape[-2] // hidden.shape[-2], weights.shape[-1] // hidden.shape[-1]
    )
    rest = values.masked_fill(finite, 0.0)
    keys = (~finite[..., 0]).flatten(0, -2).any(dim=0).nonzero().flatten().tolist()
    for n in keys:
        share = weights[..., n : n + 1] * rest[..., n : n + 1, :]
        found = found + share.masked_fill_(hidden[:, n : n + 1], 0.0)
    return found
