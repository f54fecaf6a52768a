"""One attention problem as data: builds its tensors, runs flash8 and the oracle on them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import flash8
import oracle
from tolerances import FA3_FACTOR, FA3_FACTOR_SOFTCAP, check_close, check_lse

LOW = (torch.float16, torch.bfloat16)
LEAVES = ("q", "k", "v", "qv", "s_aux")


@dataclass(frozen=True)
class Case:
    """Lengths are per sequence.  A dense case has equal storage lengths; `unused_*` rows at the end
    of each sequence are stored but not used (seqused)."""

    seqlens_q: tuple[int, ...] = (33,)
    seqlens_k: tuple[int, ...] = (47,)
    unused_q: tuple[int, ...] | None = None
    unused_k: tuple[int, ...] | None = None
    layout: str = "dense"  # dense, packed, paged
    page_size: int = 16
    tail: int = 0  # packed rows after the last sequence, which belong to nobody
    heads: int = 2
    heads_kv: int = 1
    head_dim: int = 16
    head_dim_v: int = 16
    dtype: torch.dtype = torch.float64
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0
    softcap: float = 0.0
    softmax_scale: float | None = None
    alibi: str | None = None  # None, "h", "bh"
    sink: bool = False
    qv: bool = False
    dropout_p: float = 0.0
    num_splits: int = 1
    poison: bool = False
    spread: float = 1.0  # standard deviation of q

    def __post_init__(self):
        assert len(self.seqlens_q) == len(self.seqlens_k)
        if self.layout == "dense":
            assert len(set(self.seqlens_q)) <= 1 and len(set(self.seqlens_k)) <= 1

    def with_(self, **changes) -> Case:
        return replace(self, **changes)


@dataclass
class Problem:
    """Tensors of a case.  `layout` holds the index arguments by their oracle names."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    qv: Tensor | None
    s_aux: Tensor | None
    alibi_slopes: Tensor | None
    layout: dict = field(default_factory=dict)
    seed: int = 0

    def leaves(self) -> dict[str, Tensor]:
        return {n: getattr(self, n) for n in LEAVES if getattr(self, n) is not None}


def int32(values) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def cumulative(lengths) -> Tensor:
    total, ends = 0, [0]
    for length in lengths:
        total += length
        ends.append(total)
    return int32(ends)


def build(case: Case, seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)
    batch = len(case.seqlens_q)
    wide = case.dtype if case.dtype.is_floating_point and case.dtype.itemsize > 1 else torch.float32

    def randn(*shape, dtype=wide):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    layout: dict = {}
    unused_q = case.unused_q or (0,) * batch
    unused_k = case.unused_k or (0,) * batch
    if case.unused_q is not None:
        layout["seqused_q"] = int32(a - b for a, b in zip(case.seqlens_q, unused_q, strict=True))
    if case.unused_k is not None or case.layout == "paged":
        layout["seqused_k"] = int32(a - b for a, b in zip(case.seqlens_k, unused_k, strict=True))
    if case.layout == "dense":
        rows_q, rows_k = (batch, case.seqlens_q[0]), (batch, case.seqlens_k[0])
    else:
        layout["cu_seqlens_q"] = cumulative(case.seqlens_q)
        rows_q = (sum(case.seqlens_q) + case.tail,)
        if case.layout == "packed":
            layout["cu_seqlens_k"] = cumulative(case.seqlens_k)
            rows_k = (sum(case.seqlens_k) + case.tail,)
        else:
            per_row = max(1, -(-max(case.seqlens_k, default=1) // case.page_size))
            pages = batch * per_row + 2
            order = torch.randperm(pages, generator=g)[: batch * per_row]
            layout["page_table"] = order.reshape(batch, per_row).to(torch.int32)
            rows_k = (pages, case.page_size)

    problem = Problem(
        case=case,
        q=randn(*rows_q, case.heads, case.head_dim) * case.spread,
        k=randn(*rows_k, case.heads_kv, case.head_dim),
        v=randn(*rows_k, case.heads_kv, case.head_dim_v),
        qv=randn(*rows_q, case.heads, case.head_dim_v) if case.qv else None,
        s_aux=randn(case.heads, dtype=torch.promote_types(wide, torch.float32))
        if case.sink
        else None,
        alibi_slopes=_slopes(case, randn),
        layout=layout,
        seed=seed * 7919 + 12345,
    )
    if case.poison:
        _poison(problem)
    return problem


def _slopes(case: Case, randn) -> Tensor | None:
    if case.alibi is None:
        return None
    shape = (case.heads,) if case.alibi == "h" else (len(case.seqlens_q), case.heads)
    return randn(*shape, dtype=torch.float32).abs() * 0.1


def used_masks(problem: Problem) -> tuple[Tensor, Tensor]:
    """Boolean over the storage rows of q and of k: part of some sequence and used."""
    case, layout = problem.case, problem.layout
    q_used = torch.zeros(problem.q.shape[:-2], dtype=torch.bool)
    k_used = torch.zeros(problem.k.shape[:-2], dtype=torch.bool)
    keys = oracle.Keys(
        layout.get("cu_seqlens_k"), layout.get("seqused_k"), None, layout.get("page_table")
    )
    for b, length in enumerate(case.seqlens_q):
        used = length - (case.unused_q[b] if case.unused_q else 0)
        if case.layout == "dense":
            q_used[b, :used] = True
        else:
            start = int(layout["cu_seqlens_q"][b])
            q_used[start : start + used] = True
        k_used[keys.slot(problem.k, b, torch.arange(keys.used(problem.k, b)[1]))] = True
    return q_used, k_used


def _poison(problem: Problem) -> None:
    q_used, k_used = used_masks(problem)
    for x, used in (
        (problem.q, q_used),
        (problem.qv, q_used),
        (problem.k, k_used),
        (problem.v, k_used),
    ):
        if x is not None:
            x[~used] = float("nan")


def _options(p: Problem) -> dict:
    c = p.case
    return dict(
        softmax_scale=c.softmax_scale,
        causal=c.causal,
        window_size=c.window_size,
        attention_chunk=c.attention_chunk,
        softcap=c.softcap,
        alibi_slopes=p.alibi_slopes,
        dropout_p=c.dropout_p,
        dropout_seed=p.seed if c.dropout_p else None,
    )


def call_of(p: Problem, **extra) -> tuple[str, dict]:
    """The public function that fits the layout, by name, and its arguments."""
    arguments = {"q": p.q, "k": p.k, "v": p.v, "qv": p.qv, "s_aux": p.s_aux, **_options(p)}
    arguments.update(num_splits=p.case.num_splits, return_attn_probs=True, **extra)
    if not p.layout:
        return "flash_attn_func", arguments
    arguments.update({"cu_seqlens_q": None, "cu_seqlens_k": None, **p.layout})
    for side, lengths in (("q", p.case.seqlens_q), ("k", p.case.seqlens_k)):
        arguments[f"max_seqlen_{side}"] = max(lengths, default=0)
    return "flash_attn_varlen_func", arguments


def run_flash8(p: Problem, **extra) -> tuple[Tensor, Tensor]:
    """O and LSE through flash_attn_func, or the varlen function where the layout needs it."""
    name, arguments = call_of(p, **extra)
    return getattr(flash8, name)(**arguments)


def run_oracle(p: Problem, dtype=torch.float64, **extra) -> tuple[Tensor, Tensor]:
    options = dict(_options(p), qv=p.qv, s_aux=p.s_aux, dtype=dtype, **p.layout)
    options.update(extra)
    return oracle.attention(p.q, p.k, p.v, **options)


def as_leaves(p: Problem, dtype: torch.dtype | None = None) -> Problem:
    """The same problem on fresh leaves that require grad, in `dtype` where given."""
    fresh = {n: x.detach().to(dtype or x.dtype).requires_grad_() for n, x in p.leaves().items()}
    return replace(p, **fresh)


def upstream(p: Problem, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Gradients for O and LSE; finite everywhere, unused rows included."""
    g = torch.Generator().manual_seed(seed)
    out_shape = (*p.q.shape[:-1], p.v.shape[-1])
    batch = len(p.case.seqlens_q)
    packed = p.case.layout != "dense"
    lse_shape = (p.case.heads, p.q.shape[0]) if packed else (batch, p.case.heads, p.q.shape[1])
    d_out = torch.randn(out_shape, generator=g, dtype=torch.float64).to(p.q.dtype)
    d_lse = torch.randn(lse_shape, generator=g, dtype=torch.float64)
    return d_out, d_lse.to(torch.promote_types(p.q.dtype, torch.float32))


def gradients(p: Problem, runner, d_out: Tensor, d_lse: Tensor | None, **kw) -> dict[str, Tensor]:
    """Gradients of every leaf.  d_lse None leaves LSE out of the loss."""
    leaves = p.leaves()
    out, lse = runner(p, **kw)
    outputs, upstreams = [out], [d_out.to(out.dtype)]
    if d_lse is not None:
        outputs.append(lse)
        upstreams.append(d_lse.to(lse.dtype))
    if not any(x.requires_grad for x in outputs):  # the oracle of a call without sequences
        return {n: torch.zeros_like(x) for n, x in leaves.items()}
    found = torch.autograd.grad(outputs, list(leaves.values()), upstreams, allow_unused=True)
    return {
        n: torch.zeros_like(x) if g is None else g
        for (n, x), g in zip(leaves.items(), found, strict=True)
    }


def factor(case: Case) -> float:
    return FA3_FACTOR_SOFTCAP if case.softcap > 0 else FA3_FACTOR


def check_forward(p: Problem, ulps: float = 1.0, result=None) -> None:
    """flash8 against the oracle: values, dtypes, exact zeros and -inf in rows nobody uses."""
    out, lse = result if result is not None else run_flash8(p)
    ref_out, ref_lse = run_oracle(p)
    emulation = run_oracle(p, dtype=p.case.dtype)[0] if p.case.dtype in LOW else None
    assert out.dtype == p.q.dtype and out.shape == ref_out.shape
    assert lse.dtype == torch.promote_types(p.q.dtype, torch.float32)
    assert lse.shape == ref_lse.shape
    check_close("O", out, ref_out, emulation, factor(p.case), ulps)
    check_lse("LSE", lse, ref_lse, p.case.dtype)
    assert torch.equal(torch.isinf(lse), torch.isinf(ref_lse)), "LSE: infinite in the wrong rows"
    assert (out[ref_out == 0].double() == 0).all(), "O: a row that sees nothing is not zero"


def check_backward(p: Problem, with_lse: bool = True, ulps: float = 1.0, found=None) -> None:
    d_out, d_lse = upstream(p)
    d_lse = d_lse if with_lse else None
    leaves = as_leaves(p)
    actual = found if found is not None else gradients(leaves, run_flash8, d_out, d_lse)
    reference = gradients(as_leaves(p, torch.float64), run_oracle, d_out.double(), d_lse)
    low = p.case.dtype in LOW
    emulation = gradients(leaves, run_oracle, d_out, d_lse, dtype=p.case.dtype) if low else {}
    for name, x in leaves.leaves().items():
        assert actual[name].dtype == x.dtype and actual[name].shape == x.shape
        check_close(
            f"d{name}",
            actual[name],
            reference[name],
            emulation.get(name),
            factor(p.case),
            ulps,
            p.case.dtype,
        )
