"""The kernels of a backward against the portable code, on problems that use everything they are
compiled for.

O and LSE come from the portable forward, and everything it computes is in fp64. Every row of the
gradients and the workspace is NaN before the launches.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flash8.backends import cpu
from flash8.backends.hopper import backward as hopper
from flash8.backends.hopper import streams
from flash8.backends.hopper.backward_variants import BackwardVariant, Element
from flash8.backends.hopper.verify.backward_problems import Problem, problems
from flash8.backends.hopper.verify.watchdog import Watchdog
from flash8.call.options import Options
from flash8.tensors.tokens import Tokens


class Gradients(NamedTuple):
    """What a backward gives."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    ds_aux: Tensor


class Bounds(NamedTuple):
    """How far kernels may be from the gradients in fp64."""

    total: float  # relative L2 of a gradient
    row: float  # of its worst row, relative to the mean one
    ds_aux: float  # relative to its norm


#: Two to four times what sound kernels show on the simulated device (test_trust_backward.py). P, dS
#: and the gradients are rounded to the type, and so is O, which D is made of.
_BOUNDS: dict[Element, Bounds] = {
    "fp16": Bounds(1.2e-3, 1.5e-2, 2e-3),
    "bf16": Bounds(9e-3, 0.12, 1e-2),
}
#: What the device's tanh, whose error is up to 2^-11, adds to the weights of keys and to their
#: derivative.
_TANH = 4e-3


def bounds(variant: BackwardVariant) -> Bounds:
    """What is allowed to a variant."""
    found = _BOUNDS[variant.dtype]
    return Bounds(*(allowed + _TANH for allowed in found)) if variant.softcap else found


def find_fault(variant: BackwardVariant, device: torch.device) -> str | None:
    """What is wrong with the kernels, or None. Raises what loading and launching them raise."""
    for problem in problems(variant, device):
        given, want = _expected(problem)
        if problem.q.dim() == 4 and not (
            variant.softcap or variant.fp8
        ):  # one of the two with K - mean(K)
            tokens = Tokens(seqused=problem.options.seqused_k)
            given = given._replace(k_mean=tokens.finite_mean(problem.k.float()))
        group = problem.q.shape[-2] // problem.k.shape[-2]
        # The query heads of a KV head in one CTA; of packed sequences also in one CTA each.
        for head_splits in (1, group) if problem.q.dim() == 3 else (1,):
            found = _run(variant, problem, given, head_splits)
            fault = compare(found, want, bounds(variant))
            if fault is not None:
                return fault
    return None


def compare(found: Gradients, want: Gradients, allowed: Bounds) -> str | None:
    """The difference of a result from the gradients in fp64, or None."""
    for name in ("dq", "dk", "dv"):
        x, y = getattr(found, name).double(), getattr(want, name)
        unwritten = int(x.isnan().any(dim=-1).sum())
        if unwritten:
            rows = x.shape[:-1].numel()
            return f"{unwritten} of {rows} rows of {name} are not written, or NaN"
        error = (x - y).norm(dim=-1)
        mean = float(y.norm() / math.sqrt(error.numel()))
        total, row = float(error.norm() / y.norm()), float(error.max()) / mean
        measures = ((name, total, allowed.total), (f"a row of {name}", row, allowed.row))
        for what, off, bound in measures:
            if not off <= bound:
                return f"{what} is off by {off:.2g} (relative L2), where {bound:.2g} is allowed"
    off = float((found.ds_aux.double() - want.ds_aux).norm() / want.ds_aux.norm())
    if not off <= allowed.ds_aux:
        return f"ds_aux is off by {off:.2g} (relative L2), where {allowed.ds_aux:.2g} is allowed"
    return None


def _run(
    variant: BackwardVariant, problem: Problem, given: hopper.Given, head_splits: int
) -> Gradients:
    """The gradients of the kernels."""
    dtype = problem.dout.dtype
    dq, dk, dv = (_nan_like(x, dtype) for x in (problem.q, problem.k, problem.v))
    found = Gradients(dq, dk, dv, _nan_like(problem.s_aux, problem.s_aux.dtype))
    sinks = problem.s_aux, found.ds_aux
    planned = hopper.plan(
        given, sinks, problem.options, *found[:3], variant=variant, head_splits=head_splits
    )
    planned.held[-1].fill_(0xFF)  # NaN as a float
    watchdog = Watchdog(problem.q.device)
    hopper.launch(planned, streams.current_stream(problem.q))
    watchdog.wait()
    return found


def _expected(problem: Problem) -> tuple[hopper.Given, Gradients]:
    """What the kernels are given, with NaN where they may not look, and what the portable code
    makes of it, in fp64."""
    device = problem.q.device
    # Where determinism is asked for, matrix products of a GPU may be refused, which the kernel is
    # not to blame for.
    where = torch.device("cpu") if torch.are_deterministic_algorithms_enabled() else device
    wide = (*problem.real, problem.s_aux, problem.dout, problem.dlse)
    q, k, v, s_aux, dout, dlse = (x.to(where, torch.float64) for x in wide)
    plain = problem.options._replace(
        q_descale=None, k_descale=None, v_descale=None, k_mean=None, v_mean=None
    )
    options = Options._make(x.to(where) if isinstance(x, Tensor) else x for x in plain)
    out, lse, nothing = torch.empty_like(dout), torch.empty_like(dlse), q.new_empty((0,))
    cpu.forward(q, k, v, None, s_aux, options, out, lse, nothing, nothing)
    want = Gradients(*(torch.empty_like(x) for x in (q, k, v, s_aux)))
    cpu.backward(
        *(dout, dlse, q, k, v, None, s_aux, out, lse, options),
        *(want.dq, want.dk, want.dv, nothing, want.ds_aux),
    )
    hidden = problem.dlse.isnan()  # rows that are not used
    given_out = out.to(device, problem.dout.dtype)
    given_out.masked_fill_(hidden.transpose(-1, -2)[..., None], math.nan)
    given_lse = lse.to(device, torch.float32).masked_fill_(hidden, math.nan)
    given = hopper.Given(
        problem.dout, problem.dlse, problem.q, problem.k, problem.v, given_out, given_lse
    )
    return given, Gradients(*(x.to(device) for x in want))


def _nan_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.full(x.shape, math.nan, dtype=dtype, device=x.device)
