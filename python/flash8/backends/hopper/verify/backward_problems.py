"""Small problems for the kernels of a backward: those of a forward kernel with the same choices,
and what comes back from behind O and LSE."""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flash8.backends.hopper.backward_variants import BackwardVariant, Element
from flash8.backends.hopper.variants import ForwardVariant, Scales
from flash8.backends.hopper.verify import forward_problems
from flash8.call.options import Options

_DTYPES: dict[Element, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Problem(NamedTuple):
    """What the launches and the portable code are given. Rows that are not used are NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    s_aux: Tensor
    options: Options
    dout: Tensor
    dlse: Tensor  # (batch, heads, rows) or (heads, rows)
    real: tuple[Tensor, Tensor, Tensor]  # what q, k, v stand for, in fp64


def problems(variant: BackwardVariant, device: torch.device) -> Iterator[Problem]:
    """One packed, one dense. A problem is made when the one before it has been passed.

    Of an FP8 forward the packed one has descales per block, the dense one per head.
    """
    for seed, given in enumerate(_forward_problems(variant, device)):
        generator = torch.Generator("cpu").manual_seed(11 + seed)
        hidden = given.q[..., 0].isnan()
        shape = (*given.q.shape[:-1], variant.head_dim_v)
        dout = _normal(shape, generator).to(given.q.device, _DTYPES[variant.dtype])
        dlse = _normal(hidden.transpose(-1, -2).shape, generator).to(device)
        dout = dout.masked_fill(hidden[..., None], math.nan)
        dlse = dlse.masked_fill(hidden.transpose(-1, -2), math.nan)
        yield Problem(*given[:5], dout, dlse, given.real)


def _forward_problems(
    variant: BackwardVariant, device: torch.device
) -> Iterator[forward_problems.Problem]:
    scales: tuple[Scales, ...] = ("block", "head") if variant.fp8 else ("none", "none")
    for index, granularity in enumerate(scales):
        forward = ForwardVariant(
            "e4m3" if variant.fp8 else variant.dtype,
            variant.head_dim,
            variant.head_dim_v,
            mask=variant.mask,
            softcap=variant.softcap,
            alibi=variant.alibi,
            scales=granularity,
            dropout=variant.dropout,
        )
        drawn = forward_problems.problems(forward, device, channel_descales=False)
        yield next(itertools.islice(drawn, index, None))


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
