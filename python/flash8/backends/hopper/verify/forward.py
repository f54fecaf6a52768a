"""A forward kernel against the portable code, on problems that use everything it is compiled for.

The portable code gets what the tensors represent, in fp64, so that its own rounding (and TF32) is
none of the kernel's. Every row of the outputs is NaN before the launch.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash8.backends import cpu
from flash8.backends.hopper import forward as hopper
from flash8.backends.hopper import streams
from flash8.backends.hopper.variants import Element, ForwardVariant
from flash8.backends.hopper.verify.forward_problems import SOFTCAP, Problem, problems
from flash8.backends.hopper.verify.watchdog import Watchdog
from flash8.call.options import Options

_OF_FP8 = ("q_descale", "k_descale", "v_descale", "k_mean", "v_mean", "v_channel_descale")


class Bounds(NamedTuple):
    """How far a kernel may be from attention in fp64."""

    o: float  # relative L2 of O
    row: float  # of its worst row
    lse: float  # largest difference


#: About three times what a sound kernel shows on the simulated device (test_trust.py), and much
#: more for LSE, to which tensor cores may add differently. P of e4m3 has three bits.
_BOUNDS: dict[Element, Bounds] = {
    "fp16": Bounds(8e-4, 1.5e-3, 1e-4),
    "bf16": Bounds(6e-3, 1.2e-2, 1e-4),
    "e4m3": Bounds(0.04, 0.08, 2e-3),
}
#: What the device's tanh adds to the weights of keys and to LSE: its error is up to 2^-11.
_TANH = 1.5 * SOFTCAP * 2.0**-11


def bounds(variant: ForwardVariant) -> Bounds:
    """What is allowed to a variant."""
    found = _BOUNDS[variant.dtype]
    return Bounds(*(allowed + _TANH for allowed in found)) if variant.softcap else found


def find_fault(variant: ForwardVariant, device: torch.device) -> str | None:
    """What is wrong with the kernel, or None. Raises what loading and launching it raise."""
    for problem in problems(variant, device):
        o, lse, left = _run(variant, problem)
        fault = compare(o, lse, *expected(problem), bounds(variant))
        if fault is None and left != 0:
            fault = f"its counter of tiles is left at {left}"
        if fault is not None:
            return fault
    return None


def compare(o: Tensor, lse: Tensor, want: Tensor, want_lse: Tensor, allowed: Bounds) -> str | None:
    """The difference of a result from fp64 attention, or None. O: (..., rows, heads, d_v)."""
    unwritten = int((o.isnan().any(dim=-1).transpose(-1, -2) | lse.isnan()).sum())
    if unwritten:
        return f"{unwritten} of {lse.numel()} rows are not written, or NaN"
    empty = want_lse == -math.inf
    if not torch.equal(lse == -math.inf, empty):
        return "LSE is -inf in other rows than those without keys"
    difference = torch.where(empty, 0.0, (lse.double() - want_lse).abs())
    worst = float(difference.max())
    if not worst <= allowed.lse:
        return f"LSE is off by {worst:.2g}, where {allowed.lse:.2g} is allowed"
    error, size = (o.double() - want).norm(dim=-1), want.norm(dim=-1)
    total, row = float(error.norm() / size.norm()), float((error / size.clamp_min(1e-6)).max())
    for name, found, bound in (("O", total, allowed.o), ("a row of O", row, allowed.row)):
        if not found <= bound:
            return f"{name} is off by {found:.2g} (relative L2), where {bound:.2g} is allowed"
    return None


def _run(variant: ForwardVariant, problem: Problem) -> tuple[Tensor, Tensor, int]:
    """O, LSE and the larger of the counters that tiles are claimed from, of the kernel."""
    q, k, v, s_aux, options, _, out_dtype, sm_margin = problem
    shape = (*q.shape[:-1], options.head_dim_v(v))
    out = torch.full(shape, math.nan, dtype=out_dtype, device=q.device)
    lse = rows_of(q, torch.float32)
    # Its own: a kernel that does not reset the counters must not leave that to the next call.
    tiles = streams.new_tile_count(q.device)
    planned = hopper.plan(q, k, v, s_aux, options, out, lse, variant)
    claimed = tiles if planned.dynamic_schedule else None
    watchdog = Watchdog(q.device)
    hopper.launch(planned, streams.current_stream(q), claimed, sm_margin)
    watchdog.wait()
    return out, lse, int(tiles.abs().max())


def expected(problem: Problem) -> tuple[Tensor, Tensor]:
    """O and LSE of the portable code, in fp64."""
    device = problem.q.device
    # Where determinism is asked for, matrix products of a GPU may be refused, which the kernel is
    # not to blame for.
    where = torch.device("cpu") if torch.are_deterministic_algorithms_enabled() else device
    q, k, v, s_aux = (x.to(where) for x in (*problem.real, problem.s_aux))
    # What q, k and v represent needs no descales and means.
    plain: dict[str, Any] = dict.fromkeys(_OF_FP8)
    options = problem.options._replace(v_colmajor_tokens=None, **plain)
    options = Options._make(x.to(where) if isinstance(x, Tensor) else x for x in options)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse, nothing = rows_of(q, torch.float64), q.new_empty((0,))
    cpu.forward(q, k, v, None, s_aux, options, out, lse, nothing, nothing)
    return out.to(device), lse.to(device)


def rows_of(q: Tensor, dtype: torch.dtype) -> Tensor:
    """NaN in the shape of LSE."""
    *batch, rows, heads, _ = q.shape
    return torch.full((*batch, heads, rows), math.nan, dtype=dtype, device=q.device)
