"""`decode`: a few queries over KV caches whose keys are spread over ranks.

Every rank has all queries and attends to its own keys; O and LSE of all ranks are gathered and
merged by LSE, the sink last. Token t of a sequence is with rank (t // interleave) % P, so that the
ranks' shares differ by at most `interleave` keys however long a sequence grows. How many of the
first n tokens a rank has says which of its keys a query sees:

    own(n) = n // (P I) * I + clamp(n % (P I) - rank I, 0, I)         I = interleave

keys [own(first), own(last + 1)) for a query that sees tokens first to last. Where a mask tells the
queries of a sequence apart each becomes an entry of its own. Nothing is read on the host.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flash8.attention import Window
from flash8.call import checks as calls
from flash8.call import derivatives
from flash8.distributed import checks, collectives
from flash8.distributed.merge import share
from flash8.kvcache import flash_attn_combine, flash_attn_with_kvcache
from flash8.tensors.arguments import (
    INDEX_DTYPES,
    require_bool,
    require_int,
    require_rank,
    require_shape,
    require_tensor,
)
from flash8.tensors.scaled_tensor import Input, ScaledTensor

_INT32_MAX = 2**31 - 1


def own_seqlens(seqlens: Tensor, *, group: Any, interleave: int = 1) -> Tensor:
    """How many of the first `seqlens` tokens of each sequence this rank has: the length of its own
    cache, and where it appends the next of its tokens.

    Args:
        seqlens: int32 or int64, any shape, on any device.
        group, interleave: as in `decode`.

    Returns:
        int32, in seqlens's shape.
    """
    ranks = checks.ranks_of(group)
    interleave = require_int("interleave", interleave, minimum=1, maximum=_INT32_MAX)
    require_tensor("seqlens", seqlens, INDEX_DTYPES)
    return _own(seqlens, ranks, interleave)


def decode(
    q: Tensor,
    k_cache: Input,
    v_cache: Input,
    *,
    group: Any,
    cache_seqlens: Tensor,
    interleave: int = 1,
    page_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q, the same on every rank, over caches of which each rank has a share.

    Args:
        q: (batch, seqlen_q, heads, head_dim): the last seqlen_q tokens of each sequence.
        k_cache, v_cache: this rank's caches, dense or paged, as in `flash_attn_with_kvcache`. What
            is new has been appended to them already, by the ranks that it belongs to
            (`own_seqlens`).
        group: the ProcessGroup whose ranks share the keys.
        cache_seqlens: int32 or int64 (batch,): tokens of the whole sequences, q's among them.
        interleave: token t is with rank (t // interleave) % ranks, in the order of tokens.
        causal, window_size: as in `flash_attn_with_kvcache`, by positions in the whole sequence.
        s_aux: (heads,), the same on every rank.
        The others are those of `flash_attn_with_kvcache`, of this rank's caches.

    Returns:
        O in q's layout and dtype, on every rank; with return_softmax_lse (O, LSE), LSE
        (batch, heads, seqlen_q) fp32. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is supported.
    """
    ranks = checks.ranks_of(group)
    require_bool("return_softmax_lse", return_softmax_lse)
    require_bool("causal", causal)
    interleave = require_int("interleave", interleave, minimum=1, maximum=_INT32_MAX)
    require_tensor("q", q, calls.INPUT_DTYPES)
    require_rank("q", q, 4, "(batch, seqlen_q, heads, head_dim)")
    require_tensor("cache_seqlens", cache_seqlens, INDEX_DTYPES, q)
    require_shape("cache_seqlens", cache_seqlens, (q.shape[0],), "(batch,)")
    if s_aux is not None:
        require_tensor("s_aux", s_aux, (torch.float32, torch.float64, q.dtype), q)
        require_shape("s_aux", s_aux, (q.shape[2],), "(heads,)")
    given = [x for x in (q, k_cache, v_cache, s_aux) if isinstance(x, Tensor)]
    if derivatives.is_differentiated(*given):
        raise ValueError(
            "q, k_cache, v_cache and s_aux must not require grad: decode has no backward; call it "
            "under torch.no_grad()"
        )
    left, right = calls.window(window_size)
    if causal or (right >= 0 and q.shape[1] == 1):
        right = 0 if q.shape[1] > 1 else -1  # nothing comes after the last token
    if q.shape[1] == 0:
        left, right = -1, -1
    by_query = q.shape[1] > 1 and (left, right) != (-1, -1)
    queries, lengths, padding = q, _own(cache_seqlens, ranks, interleave), None
    if left >= 0 or by_query:
        begins, ends = _seen(cache_seqlens, q.shape[1], (left, right))
        lengths = _own(ends, ranks, interleave).flatten()
        padding = None if left < 0 else _own(begins, ranks, interleave).flatten()
    if by_query:
        queries = q.flatten(0, 1)[:, None]
        cache_batch_idx = _repeated(_rows(q, cache_batch_idx), q.shape[1])
        k_cache, v_cache = (_cache_by_query(x, q.shape[1]) for x in (k_cache, v_cache))
        k_descale, v_descale = (
            x if x is None else _factor_by_query(x, 2, q.shape[1]) for x in (k_descale, v_descale)
        )
    found = flash_attn_with_kvcache(
        queries,
        k_cache,
        v_cache,
        cache_seqlens=lengths,
        cache_leftpad=padding,
        cache_batch_idx=cache_batch_idx,
        page_table=page_table,
        k_descale=k_descale,
        v_descale=v_descale,
        softmax_scale=softmax_scale,
        softcap=softcap,
        num_splits=num_splits,
        return_softmax_lse=True,
    )
    out, lse = found[0], found[1].transpose(1, 2)
    if by_query:
        out, lse = (x.reshape(*q.shape[:2], *x.shape[2:]) for x in (out, lse))
    out, lse = _merged(out, lse, s_aux, ranks)
    return (out, lse.transpose(1, 2)) if return_softmax_lse else out


def _own(tokens: Tensor, ranks: checks.Ranks, interleave: int) -> Tensor:
    """How many of the first so many tokens a rank has, int32."""
    tokens, around = tokens.long(), ranks.size * interleave
    rest = (tokens % around - ranks.rank * interleave).clamp(0, interleave)
    return (tokens // around * interleave + rest).int()


def _seen(seqlens: Tensor, queries: int, window: Window) -> tuple[Tensor, Tensor]:
    """[begin, end) of the tokens that each query sees, int64 (batch, queries)."""
    left, right = window
    lengths = seqlens.long()[:, None]
    position = lengths - queries + torch.arange(queries, device=seqlens.device)
    begins = torch.zeros_like(position) if left < 0 else (position - left).clamp_min(0)
    ends = lengths if right < 0 else (position + right + 1).clamp_min(0)
    ends = torch.minimum(ends.expand_as(position), lengths)
    return torch.minimum(begins, ends), ends


def _rows(q: Tensor, cache_batch_idx: Tensor | None) -> Tensor:
    if cache_batch_idx is not None:
        return cache_batch_idx
    return torch.arange(q.shape[0], dtype=torch.int32, device=q.device)


def _repeated(x: Tensor, count: int) -> Tensor:
    """Each row `count` times, without a wait."""
    return x[:, None].expand(-1, count, *x.shape[1:]).flatten(0, 1)


def _factor_by_query(x: Tensor, dims: int, count: int) -> Tensor:
    """Factors of sequences have so many dimensions; those of blocks or pages stay with the cache,
    and those of all sequences are those of all entries."""
    return _repeated(x, count) if x.dim() == dims else x


def _cache_by_query(x: Input, count: int) -> Input:
    if not isinstance(x, ScaledTensor):
        return x
    descale = _factor_by_query(x.descale, 2, count)
    mean = None if x.mean is None else _factor_by_query(x.mean, 3, count)
    return replace(x, descale=descale, mean=mean)


def _merged(
    out: Tensor, lse: Tensor, s_aux: Tensor | None, ranks: checks.Ranks
) -> tuple[Tensor, Tensor]:
    """Of all ranks: O (batch, seqlen_q, heads, d) and LSE (batch, seqlen_q, heads)."""
    both = torch.cat((out.to(lse.dtype), lse[..., None]), dim=-1)
    gathered = both
    for group in ranks.groups:
        gathered = collectives.gather(gathered, len(gathered), group)
    parts = gathered.unflatten(0, (ranks.size, out.shape[0]))
    total, lse = flash_attn_combine(parts[..., :-1].contiguous(), parts[..., -1].contiguous())
    if s_aux is not None:
        whole = torch.logaddexp(lse, s_aux.to(lse.dtype))
        total, lse = total * share(lse, whole)[..., None], whole
    return total.to(out.dtype), lse
