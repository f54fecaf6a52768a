"""`attention`: checks a call and hands it to its method."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from flash8.call import checks as calls
from flash8.call.autocast import cast_for_autocast
from flash8.call.observed import is_autocast_on
from flash8.call.options import Options
from flash8.distributed import checks, fp8, fp8_ring, gathered, ring, ulysses
from flash8.distributed.layout import Batch
from flash8.distributed.plan import of_whole_sequences
from flash8.fp8.recipes import Recipe, check_call
from flash8.tensors.arguments import require_bool
from flash8.tensors.float8 import E4M3

_NAMES = {"cu_seqlens_q": "cu_seqlens", "cu_seqlens_k": "cu_seqlens"}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any,
    cu_seqlens: Tensor | None = None,
    seqlen: int | None = None,
    method: str = "all_gather",
    layout: str = "zigzag",
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    recipe: Recipe | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Self-attention of sequences whose tokens are spread over the ranks of a group.

    Every rank passes the tokens that `flash8.distributed.shard` gives it and gets O of them.
    Differentiable in q, k, v, s_aux and through LSE; all ranks have to run the backward, too.

    Args:
        q: this rank's part, (batch, own tokens, heads, head_dim), or packed
            (own tokens, heads, head_dim) with cu_seqlens; dtypes as in `flash8.flash_attn_func`.
        k, v: likewise with heads_kv heads.
        group: the ProcessGroup whose ranks hold the sequences; for "ulysses+ring" the pair
            (ulysses, ring) of this process. They form a grid as the two dimensions of a DeviceMesh
            do, and `shard` and `unshard` take the pair, too.
        cu_seqlens: int32 or int64 (batch + 1,), on any device: the boundaries of the whole
            sequences, the same on every rank. Lengths may be any, 0 too. It is read on the host,
            so one on the CPU spares a wait for the device.
        seqlen: the length of the whole sequences without cu_seqlens; by default own tokens * ranks.
            Refused with cu_seqlens, which have the lengths.
        method: "all_gather": every rank gathers K and V; "ring": they travel from rank to rank;
            "ulysses": every rank attends to all tokens with some heads; "ulysses+ring": groups of
            ranks do that, and the keys travel between groups. docs/distributed.md says when to take
            which.
        layout: "zigzag" (for causal attention) or "contiguous": see `flash8.distributed.layout`.
        s_aux: (heads,), the same on every rank. Its gradient, like that of every parameter, is this
            rank's share: sum it over ranks.
        recipe: FP8 as in `flash8.fp8_attention`, with e4m3 on the wire. Where keys go around the
            backward is the 16-bit one, and "ulysses+ring" takes no `BlockScaling`. `DelayedScaling`
            gathers the amax of this rank: its `step()` needs one group of all ranks.
        The others are those of `flash8.flash_attn_func`; positions count in the whole sequence.

    Returns:
        O in q's layout and dtype; with return_attn_probs (O, LSE), LSE (batch, heads, own tokens)
        or packed (heads, own tokens), fp32 (fp64 for fp64 inputs without a recipe).

    Raises:
        TypeError, ValueError: naming the argument, its value and what is supported.
    """
    ranks = checks.ranks_of(group)
    method = checks.method(method, ranks)
    layout = checks.layout(layout)
    require_bool("return_attn_probs", return_attn_probs)
    if is_autocast_on():
        q, k, v = cast_for_autocast(q, k, v)
    checks.no_seqlen(seqlen, cu_seqlens)
    left, right = calls.window(window_size)
    longest = None if cu_seqlens is None else 0  # the plan has those of its calls
    options = Options(
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=softmax_scale,
        causal=causal,
        window_left=left,
        window_right=right,
        softcap=softcap,
        deterministic=deterministic,
    )
    if cu_seqlens is not None:
        batch = checks.packed_batch(cu_seqlens, layout)
        options = options._replace(cu_seqlens_q=cu_seqlens.to(q.device))
        options = options._replace(cu_seqlens_k=options.cu_seqlens_q)
    _, options = calls.attention(q, k, v, None, s_aux, None, options, _NAMES)
    _refuse_float8(q, k)
    packed = cu_seqlens is not None
    if not packed:
        batch = checks.dense_batch("q", q, seqlen, ranks, layout)
    for name, x in (("q", q), ("k", k)):
        checks.local_rows(name, x, batch, ranks, packed)
    rows = [x if packed else x.flatten(0, 1) for x in (q, k, v)]
    if recipe is not None:
        check_call(recipe, options)
        checks.fp8_method(method, recipe)
    out, lse = _attend(method, ranks, batch, options, rows, s_aux, recipe, return_attn_probs)
    if not packed:
        out = out.view(*q.shape[:-1], v.shape[-1])
        lse = None if lse is None else lse.reshape(q.shape[2], *q.shape[:2]).transpose(0, 1)
    return out if lse is None else (out, lse)


def _attend(
    method: str,
    ranks: checks.Ranks,
    batch: Batch,
    options: Options,
    rows: list[Tensor],
    s_aux: Tensor | None,
    recipe: Recipe | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    q, k, v = rows
    group, *others = ranks.groups
    if recipe is not None:
        module = fp8_ring if method in ("ring", "ulysses+ring") else fp8
        fp8_how = fp8.How(batch, ranks, options, recipe, return_lse)
        found = module.attend(method, q, k, v, s_aux, fp8_how)
    elif method == "all_gather":
        found = gathered.attend(q, k, v, s_aux, gathered.Gathered(batch, group, options))
    elif method == "ring":
        found = ring.attend(q, k, v, s_aux, ring.Ring(batch, group, options))
    else:
        outer, inner = (1, 0), partial(_attend_whole, batch, options)
        if others:
            how = ring.Ring(batch, others[0], options)
            outer, inner = (others[0].size(), others[0].rank()), partial(ring.attend, how=how)
        return ulysses.attend(q, k, v, s_aux, batch, group, outer, inner, return_lse)
    return found if return_lse else (found[0], None)


def _attend_whole(
    batch: Batch, options: Options, q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All tokens in one call."""
    options = of_whole_sequences(batch, options, q.device)
    found = torch.ops.flash8.forward(q, k, v, None, s_aux, *options)
    return found[0], found[1]


def _refuse_float8(q: Tensor, k: Tensor) -> None:
    for name, x in (("q", q), ("k", k)):
        if x.dtype == E4M3:
            raise TypeError(
                f"{name} must be bf16, fp16, fp32 or fp64, got {x.dtype}: raw float8 inputs are "
                "not spread over ranks"
            )
