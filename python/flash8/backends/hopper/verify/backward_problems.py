"""Small problems for the kernels of a backward: those of a forward kernel with the same choices,
and what comes back from behind O and LSE."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flash8.backends.hopper.backward_variants import BackwardVariant
from flash8.backends.hopper.variants import ForwardVariant
from flash8.backends.hopper.verify import forward_problems
from flash8.call.options import Options


class Problem(NamedTuple):
    """What the launches and the portable code are given. Rows that are not used are NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    s_aux: Tensor
    options: Options
    dout: Tensor
    dlse: Tensor  # (batch, heads, rows) or (heads, rows)


def problems(variant: BackwardVariant, device: torch.device) -> Iterator[Problem]:
    """One packed, one dense. A problem is made when the one before it has been passed."""
    forward = ForwardVariant(
        variant.dtype,
        variant.head_dim,
        variant.head_dim_v,
        mask=variant.mask,
        softcap=variant.softcap,
        alibi=variant.alibi,
        dropout=variant.dropout,
    )
    for seed, given in enumerate(forward_problems.problems(forward, device)):
        generator = torch.Generator("cpu").manual_seed(11 + seed)
        hidden = given.q[..., 0].isnan()
        dout = _normal((*given.q.shape[:-1], variant.head_dim_v), generator).to(given.q)
        dlse = _normal(hidden.transpose(-1, -2).shape, generator).to(device)
        dout = dout.masked_fill(hidden[..., None], math.nan)
        dlse = dlse.masked_fill(hidden.transpose(-1, -2), math.nan)
        yield Problem(*given[:5], dout, dlse)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
