"""An e4m3 output of attention, O ~ scale * data: its arguments, checked, and its shapes.

A row of a head has a scale for each 128 channels, so that O is an operand of `gemm.scaled_mm` by
1x128, or all of O has one scale, which the caller gives.
"""

import math
from typing import Any

import torch
from torch import Tensor

from flash8.call.geometry import Geometry
from flash8.call.options import Options
from flash8.call.scaled_mm import BLOCK
from flash8.tensors.arguments import require_tensor


def check(q: Tensor, geometry: Geometry, out_scale: Any) -> None:
    """Raises TypeError and ValueError, naming the argument, its value and what is supported."""
    head_dim_v = geometry.head_dim_v
    if head_dim_v % BLOCK != 0:
        raise ValueError(
            f"v must have a head_dim_v of a multiple of {BLOCK}, so that channels which share a "
            f"scale are of one head, got {head_dim_v}; quantize O by flash8.gemm.quantize"
        )
    if out_scale is not None:
        require_tensor("out_scale", out_scale, torch.float32, q)
        if out_scale.numel() != 1:
            raise ValueError(
                f"out_scale must have one element, got shape {tuple(out_scale.shape)}; None finds "
                f"a scale for each {BLOCK} channels of a row"
            )


def data_shape(q: Tensor, v: Tensor, options: Options) -> tuple[int, int]:
    """(tokens, heads * head_dim_v): sequences of a dense q follow each other."""
    *lead, heads, _ = q.shape
    return math.prod(lead), heads * options.head_dim_v(v)


def scale_shape(q: Tensor, v: Tensor, options: Options) -> tuple[int, int]:
    """(tokens, heads * head_dim_v / 128)."""
    tokens, columns = data_shape(q, v, options)
    return tokens, columns // BLOCK
