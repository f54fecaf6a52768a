"""Calls whose new keys the decode kernel appends itself: a step of generation is one launch.

`choose` finds the kernel of such a call. All others launch the append ahead (`append.py`).
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flash8.backends.hopper import append, decode
from flash8.backends.hopper.decode_variants import WIDEST_OF_WARP, DecodeVariant
from flash8.call.options import Options
from flash8.call.request import Appended, Queries


class NewRows(NamedTuple):
    """What a call appends; its queries, too, if they are neither rotated nor normalised."""

    k: Appended
    v: Appended
    queries: Queries


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    options: Options,
    out: Tensor | None,
    new: NewRows,
) -> DecodeVariant | None:
    """The variant that serves the whole call, or None. The append itself is not refused."""
    if qv is not None or not decode.is_wanted(q, k, options):
        return None
    if decode.refusal(q, k, v, qv, options, out) is not None:
        return None
    if append.refusal_within(*new) is not None:
        return None
    variant = decode.choose(q, k, v, options, qv, out)
    dtype = torch.bfloat16 if variant.dtype == "bf16" else torch.float16
    if variant.scales == "key" or variant.head_dim_v > WIDEST_OF_WARP or dtype != q.dtype:
        return None
    if decode.rows_of_head(q, k, options) > variant.rows:
        return None  # another block of rows would load what one stores
    return replace(variant, append=True)
