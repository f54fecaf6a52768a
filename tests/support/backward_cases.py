"""Calls of the backward kernels on the simulated device, and what float64 attention makes of them.

`check` is the whole of a case: everything that nobody may read is NaN, outputs and workspace are
poisoned, the launches are repeated under several adversarial schedules, and every row of every
gradient is compared.
"""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import tolerances
from backward_launch import BackwardKernels, Gradients
from flash8.backends.hopper.backward_variants import BackwardVariant
from flash8.compiler import Unit, compile_unit, kernel_root
from forward_cases import DTYPES, device, poisoned, reference, sequences
from forward_launch import Call

#: Of random tensors, relative to float64: what 16-bit P, dS and results cost, twice.
REL_L2 = {torch.bfloat16: 6e-3, torch.float16: 1e-3}


def images(variant: BackwardVariant, root: Path | None = None) -> list[bytes]:
    """Preprocess, kernel and postprocess, compiled from another copy of hopper/ where one is given:
    what is the same there is not compiled again."""
    parts = (variant.preprocess, variant, variant.postprocess)
    return [compile_unit(_of(root, part.unit())).ptx.read_bytes() + b"\0" for part in parts]


@functools.cache
def kernels(variant: BackwardVariant, root: Path | None = None) -> BackwardKernels:
    return BackwardKernels(device().driver, *images(variant, root))


def _of(root: Path | None, unit: Unit) -> Unit:
    if root is None:
        return unit
    source = root / unit.source.relative_to(kernel_root())
    return Unit(source, unit.defines) if _differs(source, unit.source) else unit


def _differs(source: Path, original: Path) -> bool:
    """Whether a source, or a header that it includes, has another text."""
    if source == original:
        return False
    if source.read_bytes() != original.read_bytes():
        return True
    included = re.findall(r'#include "(.*)"', source.read_text())
    return any(_differs(source.parent / name, original.parent / name) for name in included)


@dataclass(frozen=True, eq=False)
class Problem:
    """A forward call and what comes back from behind it."""

    call: Call
    dout: Tensor
    dlse: Tensor | None = None
    k_mean: Tensor | None = None  # (batch, heads_kv, head_dim) in fp32
    head_splits: int = 1
    wide: Call | None = None  # of an FP8 call: what its tensors stand for

    @property
    def plain(self) -> Call:
        """The call without descales and means."""
        return self.call if self.wide is None else self.wide


def draw(
    variant: BackwardVariant,
    rows_q: int,
    rows_k: int,
    heads: int,
    heads_kv: int,
    *,
    batch: int | None = None,
    seed: int = 0,
    with_dlse: bool = False,
    **options,
) -> Problem:
    """Normal q, k, v and dout; packed without `batch`."""
    generator = torch.Generator().manual_seed(seed)
    lead = () if batch is None else (batch,)

    def tensor(*shape: int) -> Tensor:
        return torch.randn((*lead, *shape), generator=generator)

    dtype = DTYPES[variant.dtype]
    q, k, v, dout = (
        tensor(rows, n, d).to(dtype)
        for rows, n, d in (
            (rows_q, heads, variant.head_dim),
            (rows_k, heads_kv, variant.head_dim),
            (rows_k, heads_kv, variant.head_dim_v),
            (rows_q, heads, variant.head_dim_v),
        )
    )
    window = (37, 21) if variant.mask == "local" else (-1, -1)
    given = {
        "softmax_scale": variant.head_dim**-0.5,
        "causal": variant.mask == "causal",
        "window": window,
        "softcap": 3.0 if variant.softcap else 0.0,
        **options,
    }
    dlse = tensor(heads, rows_q) if with_dlse else None
    return Problem(Call(q, k, v, **given), dout, dlse)


def with_low_logits(problem: Problem) -> Problem:
    """With scores near -100, where exp(0 - LSE) of a key that is not there is infinite."""
    q, k = problem.call.q.clone(), problem.call.k.clone()
    q[..., 0], k[..., 0] = 100 * q.shape[-1] ** 0.5, -1.0
    return replace(problem, call=replace(problem.call, q=q, k=k))


@functools.cache
def expected(problem: Problem, dtype: torch.dtype = torch.float64) -> Gradients:
    """Gradients of every row in this precision; zero in rows that are not used."""
    call = problem.plain
    leaves = {name: getattr(call, name).to(dtype).requires_grad_() for name in "qkv"}
    if call.s_aux is not None:
        leaves["s_aux"] = call.s_aux.double().requires_grad_()
    o, lse = reference(replace(call, **leaves), dtype)
    outputs, gradients = [o], [problem.dout.to(dtype)]
    if problem.dlse is not None:
        finite = torch.isfinite(lse)
        outputs.append(torch.where(finite, lse, torch.zeros_like(lse)))
        gradients.append(torch.where(finite, problem.dlse, torch.zeros_like(lse)).double())
    got = torch.autograd.grad(outputs, list(leaves.values()), gradients, allow_unused=True)
    zeros = (torch.zeros_like(x) for x in leaves.values())
    return Gradients(*(z if g is None else g for g, z in zip(got, zeros, strict=True)))


@dataclass(frozen=True)
class Saved:
    """What the forward leaves to the backward, with NaN in rows that nobody may read."""

    call: Call
    o: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None
    k_mean: Tensor | None
    head_splits: int


@functools.cache
def saved(problem: Problem) -> Saved:
    call = problem.call
    dtype = problem.dout.dtype
    o, lse = reference(problem.plain)
    given_o = torch.full(o.shape, math.nan, dtype=dtype)
    given_dout = torch.full(o.shape, math.nan, dtype=dtype)
    given_lse = torch.full(lse.shape, math.nan, dtype=torch.float32)
    given_dlse = None if problem.dlse is None else torch.full_like(given_lse, math.nan)
    for used in sequences(call):
        rows = (*used.queries[:-1], slice(None), used.queries[-1])
        given_o[used.queries] = o[used.queries].to(dtype)
        given_dout[used.queries] = problem.dout[used.queries]
        given_lse[rows] = lse[rows].float()
        if given_dlse is not None:
            given_dlse[rows] = problem.dlse[rows]
    return Saved(
        poisoned(call),
        given_o,
        given_lse,
        given_dout,
        given_dlse,
        problem.k_mean,
        problem.head_splits,
    )


def launch(
    variant: BackwardVariant,
    given: Saved,
    *,
    seed: int = 0,
    root: Path | None = None,
    built: BackwardKernels | None = None,
) -> Gradients:
    """Of the variant as it is compiled, unless others have been built."""
    device().configure(seed=seed)
    run = kernels(variant, root) if built is None else built
    try:
        return run(
            given.call,
            given.o,
            given.lse,
            given.dout,
            given.dlse,
            given.k_mean,
            given.head_splits,
        )
    except RuntimeError as error:
        raise AssertionError(f"seed {seed}: {error}\n{device().last_error()}") from error


def compare(problem: Problem, got: Gradients) -> None:
    """FA3's rule for every gradient, and a bound on the error as a whole."""
    exact = expected(problem)
    dtype = problem.dout.dtype
    emulation = expected(problem, dtype)
    factor = tolerances.FA3_FACTOR_SOFTCAP if problem.call.softcap else tolerances.FA3_FACTOR
    for name in ("dq", "dk", "dv"):
        actual, wanted = getattr(got, name), getattr(exact, name)
        assert not actual.isnan().any(), f"a row of {name} was not written, or NaN leaked"
        rough = getattr(emulation, name)
        if not wanted.any():
            # With one key dP - D is zero, but for the order in which fp32 adds up the two; O of an
            # FP8 V is rounded, and D with it.
            most = 1e-5 if problem.wide is None else 2e-2
            assert actual.abs().max() <= most if actual.numel() else True, f"{name} is not zero"
            continue
        tolerances.check_fa3(name, actual, wanted, rough, factor=factor, ulps=1.0)
        if wanted.count_nonzero() >= tolerances.MANY:
            error = tolerances.rel_l2(actual, wanted)
            assert error <= REL_L2[dtype], f"{name}: relL2 {error:.2e}"
    if exact.dsinks is not None:
        error = (got.dsinks.double() - exact.dsinks).abs()
        most = 1e-3 + rounding_of_dsinks(problem)
        assert (error <= most).all(), f"dsinks: {error} is more than {most}"


def rounding_of_dsinks(problem: Problem) -> Tensor:
    """About seven times the standard deviation of what O in 16 bits does to the gradient of a
    sink, by D = rowsum(dO * O)."""
    sinks = problem.plain.s_aux
    assert sinks is not None
    o, lse = (x.double() for x in reference(problem.plain))
    share = torch.where(lse.isfinite(), (sinks.double()[:, None] - lse).exp(), 0.0)
    rows = share.mT * (problem.dout.double() * o).norm(dim=-1)
    half_ulp = torch.finfo(problem.dout.dtype).eps / 2
    return 3 * half_ulp * rows.reshape(-1, rows.shape[-1]).norm(dim=0)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Of sums in the workspace, where blocks between sequences are never written."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def check(
    variant: BackwardVariant,
    problem: Problem,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    root: Path | None = None,
) -> Gradients:
    """Gradients of a correct call: close to float64 under every schedule, dK and dV the same, and
    dQ too where the kernel is deterministic."""
    given = saved(problem)
    got = launch(variant, given, seed=seeds[0], root=root)
    compare(problem, got)
    for seed in seeds[1:]:
        again = launch(variant, given, seed=seed, root=root)
        for name in ("dk", "dv"):
            same = torch.equal(getattr(got, name), getattr(again, name))
            assert same, f"{name} differs between the seeds {seeds[0]} and {seed}"
        if variant.deterministic:
            assert same_bits(again.dq_sums, got.dq_sums), f"dQ has other bits with seed {seed}"
        difference = tolerances.rel_l2(again.dq, got.dq.double())
        assert difference <= 1e-3, f"dQ differs by {difference:.1e} between seeds"
    return got
