"""A forward kernel with an e4m3 output against the portable code, on the problems of the others.

One problem has its scales found, the other has one given. What data and scales stand for is
compared with attention in fp64, and that the largest value of a scale is 448 says that the scale is
no larger or smaller than it has to be. Every element of the outputs is NaN before the launch.
"""

import math

import torch
from torch import Tensor

from flash8.backends.hopper import forward as wide
from flash8.backends.hopper import forward_e4m3 as hopper
from flash8.backends.hopper import streams
from flash8.backends.hopper.variants import OUT_SCALE_CHANNELS, ForwardVariant
from flash8.backends.hopper.verify.forward import Bounds, bounds, compare, expected, rows_of
from flash8.backends.hopper.verify.forward_problems import Problem, problems
from flash8.backends.hopper.verify.watchdog import Watchdog
from flash8.call.e4m3_output import data_shape, scale_shape
from flash8.tensors.float8 import E4M3, MAX

#: What rounding to e4m3 adds: relative L2 of O, and of its worst row. A value is off by up to 2^-4.
_ROUNDING, _ROUNDING_OF_ROW = 0.04, 0.0625


def find_fault(variant: ForwardVariant, device: torch.device) -> str | None:
    """What is wrong with the kernel, or None. Raises what loading and launching it raise."""
    o, row, lse = bounds(variant)
    allowed = Bounds(o + _ROUNDING, row + _ROUNDING_OF_ROW, lse)
    for number, problem in enumerate(problems(variant, device)):
        want, want_lse = expected(problem)
        given = want.abs().amax().float() / MAX[E4M3] if number > 0 else None
        data, scale, found_lse, left = _run(variant, problem, given)
        factor = scale if given is None else given.expand(scale.shape)
        values = data.float().view(*factor.shape, OUT_SCALE_CHANNELS)
        found = (values * factor[..., None]).view(want.shape)
        fault = compare(found, found_lse, want, want_lse, allowed)
        if fault is None and given is None:
            fault = _fault_of_scales(values, scale)
        if fault is None and left != 0:
            fault = f"its counter of tiles is left at {left}"
        if fault is not None:
            return fault
    return None


def _fault_of_scales(values: Tensor, scale: Tensor) -> str | None:
    """values: (tokens, scales, 128) as they are stored."""
    largest = values.abs().amax(-1)
    empty = largest == 0.0
    if not bool((scale[empty] == 1.0).all()):
        return "a row of zeros has another scale than 1"
    wrong = int((largest[~empty] != MAX[E4M3]).sum())
    if wrong:
        return f"{wrong} of {scale.numel()} scales are not the largest value of their row by 448"
    return None


def _run(
    variant: ForwardVariant, problem: Problem, given: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Data, scales, LSE and the larger of the counters of tiles, of the kernel."""
    q, k, v, s_aux, options, _, _, sm_margin = problem
    shape = data_shape(q, v, options)
    data = torch.full(shape, 0x7F, dtype=torch.uint8, device=q.device).view(E4M3)
    scale = torch.full(scale_shape(q, v, options), math.nan, dtype=torch.float32, device=q.device)
    lse = rows_of(q, torch.float32)
    # Its own: a kernel that does not reset the counters must not leave that to the next call.
    tiles = streams.new_tile_count(q.device)
    planned = hopper.plan(q, k, v, s_aux, given, options, data, scale, lse, variant)
    claimed = tiles if planned.dynamic_schedule else None
    watchdog = Watchdog(q.device)
    wide.launch(planned, streams.current_stream(q), claimed, sm_margin)
    watchdog.wait()
    return data, scale, lse, int(tiles.abs().max())
