"""Cases of `flash8.distributed.attention`: what each rank does, and what one process has to find.

The layouts are written out here once more, by their definition, so that a test does not take the
code's word for who has which token.
"""

import random
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import distributed_faults
import oracle
from flash8 import distributed, flash_attn_varlen_func, fp8_attention
from flash8.fp8 import BlockScaling, CurrentScaling, DelayedScaling
from process_group import GRID, Processes

RAGGED = (37, 0, 1, 64, 3, 23, 2)


def random_case(seed: int) -> "Case":
    """Any call, in float64."""
    chosen = random.Random(seed)
    method = chosen.choice(("all_gather", "ring", "ring", "ulysses", "ulysses+ring"))
    causal = chosen.random() < 0.5
    heads_kv = chosen.choice((1, 2, 4))
    lengths = [
        chosen.choice((0, 1, 2, 3, 5, 8, 13, 31, 47, 64)) for _ in range(chosen.randint(1, 5))
    ]
    sides = [chosen.choice((-1, 0, 1, 4, 11, 30)) for _ in range(2)]
    return Case(
        f"{seed}-{method}",
        lengths=(*lengths, 7),  # gradients of no tokens cannot be compared
        ranks=4 if method == "ulysses+ring" else chosen.choice((1, 2, 4)),
        method=method,
        layout=chosen.choice(("zigzag", "contiguous")),
        dtype=torch.float64,
        heads_kv=heads_kv,
        head_dim_v=chosen.choice((8, 16)),
        causal=causal,
        window=(sides[0], -1 if causal else sides[1]),
        softcap=chosen.choice((0.0, 2.0)),
        sink=chosen.random() < 0.5,
    )


RECIPES = {
    "head": CurrentScaling,
    "tensor": partial(CurrentScaling, granularity="tensor", backward="fp8_scores"),
    "tensor16": partial(CurrentScaling, granularity="tensor"),
    "smooth": partial(CurrentScaling, smooth_k=True, smooth_v=True, hadamard=True),
    "block": BlockScaling,
    "block-smooth": partial(BlockScaling, smooth_k=True, hadamard=3, backward="fp8"),
    "delayed": partial(DelayedScaling, smooth_k=True),
}


@dataclass(frozen=True)
class Case:
    """One call. Without `lengths` it is dense, 2 sequences of `seqlen`."""

    name: str
    lengths: tuple[int, ...] | None = RAGGED
    seqlen: int = 0
    ranks: int = 2
    method: str = "all_gather"
    layout: str = "zigzag"
    dtype: torch.dtype = torch.float32
    heads: int = 4
    heads_kv: int = 2
    head_dim: int = 16
    head_dim_v: int = 16
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sink: bool = False
    logits: float = 1.0  # a factor of q
    recipe: str = ""  # of RECIPES
    bias: float = 0.0  # of k and v
    mixed: bool = False  # the loss of rank 0 is of O alone, that of rank 1 of LSE alone
    fault: str = ""

    @property
    def processes(self) -> int | str:
        return GRID if self.method == "ulysses+ring" else self.ranks

    @property
    def all_lengths(self) -> tuple[int, ...]:
        return (self.seqlen,) * 2 if self.lengths is None else self.lengths

    def options(self) -> dict[str, Any]:
        return dict(causal=self.causal, window_size=self.window, softcap=self.softcap)

    def __str__(self) -> str:
        return self.name


@dataclass
class Whole:
    """All tokens, packed: what every process makes from the case alone."""

    q: Tensor
    k: Tensor
    v: Tensor
    s_aux: Tensor | None
    dout: Tensor
    dlse: Tensor
    cu_seqlens: Tensor


def whole(case: Case) -> Whole:
    generator = torch.Generator().manual_seed(5)
    total = sum(case.all_lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q = normal(total, case.heads, case.head_dim) * case.logits
    k = normal(total, case.heads_kv, case.head_dim) + case.bias
    v = normal(total, case.heads_kv, case.head_dim_v) + case.bias
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    s_aux = normal(case.heads).to(wide) if case.sink else None
    dout = normal(total, case.heads, case.head_dim_v)
    dlse = normal(case.heads, total)
    q, k, v, dout = (x.to(case.dtype) for x in (q, k, v, dout))
    dlse = dlse.to(wide)
    if case.mixed:
        dlse[:, own_rows(case, 0)] = 0.0
        dout[own_rows(case, 1)] = 0.0
    cu_seqlens = torch.tensor([0, *case.all_lengths]).cumsum(0).int()
    return Whole(q, k, v, s_aux, dout, dlse, cu_seqlens)


def recipe_of(case: Case) -> Any:
    """A recipe of its own for every call: some have a state."""
    return RECIPES[case.recipe]() if case.recipe else None


def own_rows(case: Case, rank: int) -> Tensor:
    """The tokens of a rank by the definition of the layout."""
    rows, start = [], 0
    for length in case.all_lengths:
        if case.layout == "contiguous":
            cuts = [(rank * length // case.ranks, (rank + 1) * length // case.ranks)]
        else:
            n = 2 * case.ranks
            cuts = [(i * length // n, (i + 1) * length // n) for i in (rank, n - 1 - rank)]
        rows += [start + i for begin, end in cuts for i in range(begin, end)]
        start += length
    return torch.tensor(rows, dtype=torch.int64)


def attend(group: Any, case: Case) -> dict[str, np.ndarray]:
    """In each process: its O, LSE and gradients."""
    data, rows = whole(case), own_rows(case, dist.get_rank())
    dense = case.lengths is None
    batch = len(case.all_lengths)

    def part(x: Tensor) -> Tensor:
        x = x[rows]
        return x.unflatten(0, (batch, len(rows) // batch)) if dense else x

    q, k, v = (part(x).requires_grad_() for x in (data.q, data.k, data.v))
    s_aux = None if data.s_aux is None else data.s_aux.requires_grad_()
    dlse = data.dlse[:, rows]
    if dense:
        dlse = dlse.unflatten(1, (batch, len(rows) // batch)).transpose(0, 1)
    with ExitStack() as stack:
        if case.fault:
            stack.enter_context(distributed_faults.planted(case.fault))
        out, lse = distributed.attention(
            q,
            k,
            v,
            group=group,
            cu_seqlens=None if dense else data.cu_seqlens,
            seqlen=case.seqlen if dense else None,
            method=case.method,
            layout=case.layout,
            s_aux=s_aux,
            return_attn_probs=True,
            recipe=recipe_of(case),
            **case.options(),
        )
        inputs = [x for x in (q, k, v, s_aux) if x is not None]
        outputs = [(out, part(data.dout)), (lse, dlse)]
        if case.mixed and dist.get_rank() < 2:
            outputs = outputs[dist.get_rank() :][:1]
        used, gradients = zip(*outputs, strict=True)
        dq, dk, dv, *rest = torch.autograd.grad(used, inputs, gradients)
    found = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    found = {name: x.flatten(0, 1) if dense else x for name, x in found.items()}
    found["lse"] = lse.transpose(0, 1).flatten(1) if dense else lse
    if rest:
        found["ds_aux"] = rest[0]
    assert all(x.dtype == case.dtype for name, x in found.items() if name not in ("lse", "ds_aux"))
    return {name: x.detach().double().numpy() for name, x in found.items()}


def joined(case: Case, parts: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Of all tokens, from what the ranks have found. The sink's gradients are added up."""
    total = sum(case.all_lengths)
    found: dict[str, Tensor] = {}
    for rank, part in enumerate(parts):
        rows = own_rows(case, rank)
        for name, values in part.items():
            own = torch.from_numpy(values)
            if name == "ds_aux":
                found[name] = found.get(name, 0) + own
            elif name == "lse":
                found.setdefault(name, torch.full((case.heads, total), torch.nan).double())
                found[name][:, rows] = own
            else:
                shape = (total, *own.shape[1:])
                found.setdefault(name, torch.full(shape, torch.nan).double())[rows] = own
    return found


def found_by(processes: Processes, case: Case) -> dict[str, Tensor]:
    """What a case's processes find, joined."""
    return joined(case, processes.run(attend, case.processes, case))


def expected(case: Case) -> dict[str, Tensor]:
    """By the oracle, in float64."""
    data = whole(case)
    inputs = [x.double().requires_grad_() for x in (data.q, data.k, data.v)]
    s_aux = None if data.s_aux is None else data.s_aux.double().requires_grad_()
    cu = data.cu_seqlens
    out, lse = oracle.attention(
        *inputs, cu_seqlens_q=cu, cu_seqlens_k=cu, s_aux=s_aux, **case.options()
    )
    return _with_gradients(out, lse, inputs, s_aux, data)


def single(case: Case) -> dict[str, Tensor]:
    """By one process and one call."""
    data = whole(case)
    inputs = [x.requires_grad_() for x in (data.q, data.k, data.v)]
    s_aux = None if data.s_aux is None else data.s_aux.requires_grad_()
    cu, longest = data.cu_seqlens, max(case.all_lengths)
    lengths = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest)
    given = dict(s_aux=s_aux, return_attn_probs=True, **lengths, **case.options())
    if case.recipe:
        out, lse = fp8_attention(*inputs, recipe_of(case), **given)
    else:
        out, lse = flash_attn_varlen_func(*inputs, **given)
    return _with_gradients(out, lse, inputs, s_aux, data)


def _with_gradients(
    out: Tensor, lse: Tensor, inputs: list[Tensor], s_aux: Tensor | None, data: Whole
) -> dict[str, Tensor]:
    seen = torch.isfinite(lse)
    given = [*inputs, *([] if s_aux is None else [s_aux])]
    dout, dlse = data.dout.to(out.dtype), torch.where(seen, data.dlse, 0.0).to(lse.dtype)
    gradients = torch.autograd.grad((out, lse), given, (dout, dlse))
    names = ["out", "lse", "dq", "dk", "dv", *(["ds_aux"] if s_aux is not None else [])]
    found = dict(zip(names, (out, lse, *gradients), strict=True))
    return {name: x.detach().double() for name, x in found.items()}


def differences(found: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """|found - reference| / |reference| of each, infinite where something is no number."""
    assert found.keys() == reference.keys()
    result = {}
    for name, x in found.items():
        y = reference[name]
        same = torch.where(x == y, 0.0, x - y)
        result[name] = torch.nan_to_num((same.norm() / y.norm()), nan=torch.inf).item()
    return result


def with_dtype(case: Case, dtype: torch.dtype) -> Case:
    return replace(case, name=f"{case.name}-{dtype}".replace("torch.", ""), dtype=dtype)
