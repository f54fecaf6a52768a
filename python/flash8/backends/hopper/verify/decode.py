"""A decode kernel against the portable code, on caches that use everything it is compiled for.

Sequences are ragged, one is empty, one spans several CTAs; query heads share KV heads, there are
sinks, and what must not be read is NaN: slots, left padding, what a window hides from all queries.
A table has no page for them. The portable code gets what the tensors represent, in fp64.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash8.backends import cpu
from flash8.backends.hopper import decode as hopper
from flash8.backends.hopper import streams
from flash8.backends.hopper.decode_append import NewRows
from flash8.backends.hopper.decode_variants import DecodeVariant
from flash8.backends.hopper.verify.forward import Bounds, compare
from flash8.backends.hopper.verify.forward_problems import NO_PAGES
from flash8.backends.hopper.verify.watchdog import Watchdog
from flash8.call.options import Options
from flash8.tensors.descales import BLOCK
from flash8.tensors.float8 import E4M3

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_HEADS_KV = 2
_LENGTHS = (1100, 0, 77, 1, 300)
_LEFTPAD = (3, 0, 11, 0, 129)
_SOFTCAP = 1.5
_UNIT = 32.0  # of e4m3 values, which then use the range; the descales are about its inverse
_ALL_CTAS = 0  # a margin that leaves as many as there is work for
_ONE_CTA = 1 << 30  # and one that leaves one
#: Query heads of a KV head and queries, by rows of the tile: the last rows are nobody's.
_ROWS = {8: (3, 2), 16: (5, 3), 32: (7, 4)}
_SPLIT_KEYS = 128


class Problem(NamedTuple):
    """What a launch and the portable code are given."""

    q: Tensor
    k: Tensor
    v: Tensor
    s_aux: Tensor
    options: Options
    real: tuple[Tensor, Tensor, Tensor]  # what q, k, v represent, in fp64, without NaN
    sm_margins: tuple[int, ...]  # with splits all of them have to give the same bits
    qv: Tensor | None = None


def bounds(variant: DecodeVariant) -> Bounds:
    """What is allowed to a variant: O is rounded to its type, and P of bf16 keys to theirs."""
    found = Bounds(8e-4, 2e-3, 1e-4) if variant.dtype == "fp16" else Bounds(6e-3, 1.2e-2, 1e-4)
    # The device's tanh: its error is up to 2^-11.
    tanh = 1.5 * _SOFTCAP * 2.0**-11 if variant.score_mod else 0.0
    return Bounds(*(allowed + tanh for allowed in found))


def find_fault(variant: DecodeVariant, device: torch.device) -> str | None:
    """What is wrong with the kernel, or None. Raises what loading and launching it raise."""
    for problem in problems(variant, device):
        o, lse, left = run(variant, problem)
        fault = compare(o, lse, *expected(problem), bounds(variant))
        if fault is None and left != 0:
            fault = f"its tickets are left at {left}"
        for sm_margin in problem.sm_margins[1:]:
            again = run(variant, problem._replace(sm_margins=(sm_margin,)))
            if fault is None and not (torch.equal(o, again[0]) and torch.equal(lse, again[1])):
                fault = "with split_keys its bits depend on the number of CTAs"
        if fault is not None:
            return fault
    return None


def problems(
    variant: DecodeVariant, device: torch.device, may_be_e4m3: bool = True
) -> Iterator[Problem]:
    """Three: pages under a causal mask, on as many CTAs as there is work for; a window, by one CTA,
    over a dense cache where the kernel takes one, with queries of e4m3 where it takes them; and a
    tree over pages, in splits, both on all CTAs and on one."""
    gathers = variant.load == "gather"
    yield _problem(variant, device, 3 if gathers else 16, (_ALL_CTAS,), causal=True, window_right=0)
    window = {"window_left": 90, "window_right": 2}
    e4m3_q = variant.cache == "e4m3" and not variant.qv and may_be_e4m3
    yield _problem(variant, device, 1 if gathers else None, (_ONE_CTA,), e4m3_q, **window)
    splits: dict[str, Any] = {
        "split_keys": _SPLIT_KEYS,
        "tree_mask": _tree(variant, device),
        "window_left": 700,
    }
    yield _problem(variant, device, 5 if gathers else 24, (_ALL_CTAS, _ONE_CTA), **splits)


def _tree(variant: DecodeVariant, device: torch.device) -> Tensor:
    """int32 (batch, seqlen_q): every draft sees itself, and some of the others."""
    _, seqlen_q = _ROWS[variant.rows]
    generator = torch.Generator("cpu").manual_seed(2)
    words = torch.randint(2**seqlen_q, (len(_LENGTHS), seqlen_q), generator=generator)
    return (words | 1 << torch.arange(seqlen_q)).int().to(device)


def _problem(
    variant: DecodeVariant,
    device: torch.device,
    page_size: int | None,
    sm_margins: tuple[int, ...],
    e4m3_q: bool = False,
    **masks: Any,
) -> Problem:
    generator = torch.Generator("cpu").manual_seed(1)
    batch, room = len(_LENGTHS), max(_LENGTHS)
    ratio, seqlen_q = _ROWS[variant.rows]
    dtype = _DTYPES[variant.dtype]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def int32(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    q = draw(batch, seqlen_q, ratio * _HEADS_KV, variant.head_dim).to(dtype)
    real = [q.double()]
    given: dict[str, Any] = masks
    if e4m3_q:
        q = (q * _UNIT).to(E4M3)
        factor = (1.0 + torch.rand(batch, q.shape[2], generator=generator)) / _UNIT
        real = [q.double() * factor.double()[:, None, :, None]]
        given["q_descale"] = factor.to(device)
    table = None
    pages, rows = batch, room
    if page_size is not None:
        columns = -(-room // page_size)
        pages, rows = batch * columns + 1, page_size
        order = torch.randperm(pages, generator=generator)
        table = order[: batch * columns].view(batch, columns).int()
    lengths = int32(_LENGTHS)
    leftpad = int32([min(p, n) for p, n in zip(_LEFTPAD, _LENGTHS, strict=True)])
    first = leftpad
    if "window_left" in masks:  # of the first query
        first = first + (lengths - leftpad - seqlen_q - masks["window_left"]).clamp_min(0)
    used = seen(pages, rows, table, lengths, first)
    if table is not None:
        freed = ~used.any(dim=1)[table]
        table[freed] = int32(NO_PAGES).repeat(table.numel())[: int(freed.sum())]
    stored: list[Tensor] = []
    for name, head_dim in (("k", variant.head_dim), ("v", variant.head_dim_v)):
        x = draw(pages, rows, _HEADS_KV, head_dim)
        if variant.cache == "e4m3":
            x = (x * _UNIT).to(E4M3)
            factor = torch.tensor([1.0, 1.5] if name == "k" else [1.75, 1.25]) / _UNIT
            descale = factor.expand(batch, -1)
            if variant.scales == "key":
                factor = factor * torch.exp2(3.0 * draw(pages, rows, 1).tanh())
                if name == "v":  # by page, or by block of a dense cache
                    block = rows if page_size is not None else BLOCK
                    factor = factor[:, ::block]
                    descale, factor = factor.transpose(1, 2), factor.repeat_interleave(block, 1)
                    factor = factor[:, :rows]
                else:
                    descale = torch.where(used[..., None], factor, math.nan)
            given[f"{name}_descale"] = descale.contiguous().to(device)
            # K's is not exact under a softcap.
            mean = 0.5 * draw(_HEADS_KV, head_dim)
            mean *= (name == "v" or not variant.score_mod) and not variant.qv
            given |= {f"{name}_mean": mean.to(device)} if mean.any() else {}
            real.append(x.double() * factor.double()[..., None] + mean.double())
        else:
            x = x.to(dtype)
            real.append(x.double())
        hidden = torch.where(used[..., None, None], x.float(), math.nan).to(x.dtype)
        stored.append(hidden.to(device))
    if table is not None:
        given["page_table"] = table.to(device)
    if variant.score_mod:
        given["softcap"] = _SOFTCAP
        given["alibi_slopes"] = torch.linspace(0.0, 0.02, q.shape[2]).to(device)
    options = Options(
        seqused_k=lengths.to(device), leftpad_k=leftpad.to(device), is_cache=True, **given
    )
    sinks = torch.linspace(-1.0, 1.0, q.shape[2]).to(device)
    k, v = _of_one_cache(*stored) if variant.qv else stored
    qv = None
    if variant.qv:
        qv = draw(*q.shape[:-1], variant.head_dim_v).to(dtype).to(device)
        options = options._replace(softmax_scale=(variant.head_dim + variant.head_dim_v) ** -0.5)
    q_real, k_real, v_real = (x.to(device) for x in real)
    return Problem(q.to(device), k, v, sinks, options, (q_real, k_real, v_real), sm_margins, qv)


def _of_one_cache(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As absorbed MLA keeps them: the channels of v, then those of k."""
    width = v.shape[-1]
    both = k.new_empty((*k.shape[:-1], width + k.shape[-1]))
    both[..., :width], both[..., width:] = v, k
    return both[..., width:], both[..., :width]


def seen(pages: int, rows: int, table: Tensor | None, lengths: Tensor, begins: Tensor) -> Tensor:
    """bool (pages, rows): the slots that hold keys [begin, length) of a sequence."""
    used = torch.zeros(pages, rows, dtype=torch.bool)
    for b, (first, end) in enumerate(zip(begins.tolist(), lengths.tolist(), strict=True)):
        keys = torch.arange(first, end)
        if table is None:
            used[b, keys] = True
        else:
            used[table[b].long()[keys // rows], keys % rows] = True
    return used


def run(
    variant: DecodeVariant, problem: Problem, new: NewRows | None = None
) -> tuple[Tensor, Tensor, int]:
    """O, LSE and the largest ticket that is left, of the kernel."""
    q, k, v, s_aux, options, _, sm_margins, qv = problem
    out = torch.full(
        (*q.shape[:-1], v.shape[-1]), math.nan, dtype=_DTYPES[variant.dtype], device=q.device
    )
    lse = _rows(q, torch.float32)
    options = options._replace(sm_margin=sm_margins[0])
    planned = hopper.plan(q, k, v, s_aux, options, out, lse, qv, variant, new)
    # Its own: a kernel that does not reset them must not leave that to the next call.
    count = planned.workspace["tickets"] // 4
    tickets = torch.zeros(count, dtype=torch.int32, device=q.device)
    watchdog = Watchdog(q.device)
    hopper.launch(planned, streams.current_stream(q), tickets)
    watchdog.wait()
    return out, lse, int(tickets.abs().max())


def expected(problem: Problem) -> tuple[Tensor, Tensor]:
    """O and LSE of the portable code, in fp64."""
    device = problem.q.device
    where = torch.device("cpu") if torch.are_deterministic_algorithms_enabled() else device
    q, k, v, s_aux = (x.to(where) for x in (*problem.real, problem.s_aux))
    qv = None if problem.qv is None else problem.qv.to(where, torch.float64)
    plain: dict[str, Any] = dict.fromkeys(
        ("q_descale", "k_descale", "v_descale", "k_mean", "v_mean")
    )
    options = problem.options._replace(**plain)
    options = Options._make(x.to(where) if isinstance(x, Tensor) else x for x in options)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse, nothing = _rows(q, torch.float64), q.new_empty((0,))
    cpu.forward(q, k, v, qv, s_aux, options, out, lse, nothing, nothing)
    return out.to(device), lse.to(device)


def _rows(q: Tensor, dtype: torch.dtype) -> Tensor:
    """NaN in the shape of LSE."""
    batch, rows, heads, _ = q.shape
    return torch.full((batch, heads, rows), math.nan, dtype=dtype, device=q.device)
