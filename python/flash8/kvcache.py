"""Attention over a KV cache, with append and rotary embedding, and merging of split results."""

from typing import Any

import torch
from torch import Tensor

from flash8.append import NewKeys
from flash8.attention import Window
from flash8.call import checks, derivatives
from flash8.call.autocast import cast_for_autocast
from flash8.call.observed import is_autocast_on
from flash8.call.options import Arguments, Options
from flash8.call.unwrap import unwrap
from flash8.ops import attention as ops
from flash8.ops import combine, decode_plans, plan_cache
from flash8.scheduler import num_splits_of
from flash8.tensors import memory
from flash8.tensors.arguments import (
    INDEX_DTYPES,
    call_by,
    require_bool,
    require_contiguous_last,
    require_int,
    require_shape,
    require_tensor,
    to_int32,
)
from flash8.tensors.scaled_tensor import Input

#: What `checks` and this function call the same arguments.
_CACHE_NAMES = decode_plans.CACHE_NAMES
_OWN_NAMES = {theirs: ours for ours, theirs in _CACHE_NAMES.items()}


def flash_attn_with_kvcache(
    q: Input,
    k_cache: Input,
    v_cache: Input,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    out: Tensor | None = None,
    k_mean: Tensor | None = None,
    v_mean: Tensor | None = None,
    tree_mask: Tensor | None = None,
    split_keys: int = 0,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of q over a KV cache, which takes up new keys and values first, in place.

    Args as in `flash8.flash_attn_varlen_func`, and:
        q: (batch, seqlen_q, heads, head_dim), or (total_q, heads, head_dim) with cu_seqlens_q and
            max_seqlen_q.
        k_cache, v_cache: (batch_cache, seqlen_cache, heads_kv, head_dim[_v]), or with page_table
            (pages, page_size, heads_kv, head_dim[_v]), any page size. float8_e4m3fn caches serve
            wider q too.
        k, v: (batch, seqlen_new, heads_kv, head_dim[_v]) to append at cache_seqlens, or
            (total_new, heads_kv, head_dim[_v]) with cu_seqlens_k_new. For an e4m3 cache either
            e4m3, written as they are, or wider: then k is rotated, k_mean and v_mean are
            subtracted, and both are quantized once with the cache's k_descale and v_descale. On a
            Hopper GPU kernels do it, in attention's own launch where the rows are few, and no index
            is read on the host. Only the sequence of a new row may be one that sees it.
        rotary_cos, rotary_sin: (seqlen_rotary, rotary_dim / 2), rotary_dim a multiple of 16; only
            with k and v. k is rotated at rotary_seqlens + 0, 1, ...; so is q if the call is causal
            or local, and otherwise all of q at rotary_seqlens.
        cache_seqlens: int or int32 (batch,): used length of the cache before the append; None:
            all of it.
        cache_batch_idx: int32 (batch,): which row of the cache, or of the page table, each
            sequence has; -1 for a row without work: nothing is appended, O = 0, LSE = -inf. A row
            that is appended to must be named once (refused on CPU tensors).
        cache_leftpad: int32 (batch,): the first used position of each row.
        page_table: int32 (batch or batch_cache, max_pages).
        rotary_seqlens: int32 (batch,): the rotary position of the first new token, default
            cache_seqlens.
        rotary_interleaved: pairs (0, 1), (2, 3), ... rather than (0, rotary_dim / 2), ...
        scheduler_metadata: from `get_scheduler_metadata` for the same sizes. On a GPU for the same
            lengths, too: then the kernel need not go through them; it notices others. Calls that
            torch traces, and those with gradients, do without it.
        num_splits: 0 chooses, and so does any above 1 with scheduler_metadata on a GPU: a bound.
            1 splits no sequence: on a GPU one CTA has all keys of a KV head, and a sequence's bits
            do not depend on the others of the batch, as with split_keys.
        k_descale, v_descale: with page_table also (pages, heads_kv, 1), one per page, and without
            (batch_cache, heads_kv, ceil(seqlen_cache / 128)); of either cache also one per token,
            k_cache's shape without head_dim. An append reads them and never changes them: a page's
            descale must be set before its first token arrives, and with one per token new rows
            are e4m3, with their descales in place.
        k_mean, v_mean: fp32 (heads_kv, d) or (batch, heads_kv, d), with an e4m3 cache: what its
            rows lack, fixed when the cache was first filled.
        tree_mask: int32 or uint32, q's shape without heads and head_dim: draft tokens that form a
            tree. Bit n of a query's word says whether it sees the n-th of the sequence's last
            seqlen_q keys, of at most 32; what causal, window_size and attention_chunk hide stays
            hidden. Let drafts that no query sees hold finite values.
        split_keys: a multiple of 64: keys after each of which a sequence is split, and nowhere
            else. Its bits then do not depend on the other sequences of the batch, for one number
            of queries, or one max_seqlen_q. Each split that the cache has room for takes a place
            in a workspace, of rows x (head_dim_v + 2) x 4 bytes for a KV head. 0: any place.
        q_norm_weight, k_norm_weight: (head_dim,) of q's and k's dtype or fp32, only with k and v:
            x / sqrt(mean(x^2) + norm_eps) * weight of each head of q or k, before the rotation and
            rounded once with it. A model whose norm multiplies by 1 + w (Gemma) passes that.

    Returns:
        O; with return_softmax_lse (O, LSE, O of the splits, LSE of the splits), the last two fp32
        and empty unless num_splits > 1.

    Without k and v the call is differentiable. With them the cache changes in place, so tensors
    that require grad or carry a tangent are refused. Inside torch.autocast q, qv, k and v are cast
    where the cache has autocast's dtype or is e4m3; a cache never is.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is supported. The cache is
            unchanged then.
    """
    if return_softmax_lse is not False:
        require_bool("return_softmax_lse", return_softmax_lse)
    if rotary_interleaved is not True:
        require_bool("rotary_interleaved", rotary_interleaved)
    if cu_seqlens_q is not None and max_seqlen_q is None:
        raise ValueError("max_seqlen_q must be given with cu_seqlens_q, got None")
    if is_autocast_on():
        q, k, v, qv = _cast_for_autocast(k_cache, q, k, v, qv)
    given = decode_plans.run(q)(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        k=k,
        v=v,
        qv=qv,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        page_table=page_table,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        max_seqlen_q=max_seqlen_q,
        rotary_seqlens=rotary_seqlens,
        rotary_interleaved=rotary_interleaved,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        scheduler_metadata=scheduler_metadata,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
        s_aux=s_aux,
        alibi_slopes=alibi_slopes,
        out=out,
        k_mean=k_mean,
        v_mean=v_mean,
        tree_mask=tree_mask,
        split_keys=split_keys,
        q_norm_weight=q_norm_weight,
        k_norm_weight=k_norm_weight,
        norm_eps=norm_eps,
        return_softmax_lse=return_softmax_lse,
    )
    if isinstance(given, tuple):
        of_plan, lse = given
        return of_plan if lse is None else _with_no_splits(of_plan, lse)
    appends = k is not None or v is not None
    of_forward = {} if appends else _as_forward_call(given)
    if not appends and (found := plan_cache.find(of_forward, return_softmax_lse)) is not None:
        return _with_no_splits(*found) if return_softmax_lse else found
    window_left, window_right = checks.window(window_size)
    rotated = getattr(k_cache, "rotation", None) is not None
    arguments: Arguments = {
        "q": q,
        "k": k_cache,
        "v": v_cache,
        "q_descale": q_descale,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "k_mean": k_mean,
        "v_mean": v_mean,
        "cu_seqlens_q": cu_seqlens_q,
        "max_seqlen_q": max_seqlen_q,
        "leftpad_k": cache_leftpad,
        "page_table": page_table,
        "kv_batch_idx": cache_batch_idx,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_left": window_left,
        "window_right": window_right,
        "attention_chunk": attention_chunk,
        "softcap": softcap,
        "num_splits": num_splits,
        "pack_gqa": pack_gqa,
        "sm_margin": sm_margin,
        "alibi_slopes": alibi_slopes,
        "tree_mask": tree_mask,
        "split_keys": split_keys,
    }
    arguments |= unwrap(arguments)
    query, keys, values = arguments["q"], arguments["k"], arguments["v"]
    options = Options.of(arguments)
    if options.v_colmajor_tokens is not None or options.v_channel_descale is not None:
        raise ValueError(
            "v_cache must lie by token and have no descale per channel: new tokens are written "
            "to it; quantize it with v_colmajor=False and another granularity than 'channel'"
        )
    lengths = _lengths(query, keys, cache_seqlens, cu_seqlens_q)
    options = options._replace(seqused_k=lengths, is_cache=True)
    geometry, options = checks.attention(query, keys, values, qv, s_aux, out, options, _CACHE_NAMES)
    require_contiguous_last("k_cache", keys)
    require_contiguous_last("v_cache", values)
    if scheduler_metadata is not None:
        page_size = keys.shape[1] if geometry.paged else 0
        planned = num_splits_of(scheduler_metadata, query, geometry, options, page_size)
        checks.refuse_two_splits(options.split_keys, planned)
        options = options._replace(num_splits=planned)
    options = ops.resolve_num_splits(query, geometry, options)
    rotary, appended = (rotary_cos, rotary_sin), None
    norms = {"q": q_norm_weight, "k": k_norm_weight}
    if not appends:
        _refuse_without_new_keys(cu_seqlens_k_new, rotary, norms)
    else:
        new = NewKeys(k, v, cu_seqlens_k_new, keys, values, geometry, options)
        appended_with = (*rotary, *norms.values(), options.k_descale, options.v_descale)
        tables = [x for x in appended_with if isinstance(x, Tensor)]
        new.refuse_overlap(query, qv)
        new.refuse_gradients(query, qv, s_aux, *tables)
        if rotated:
            new.refuse_rotated_cache(rotary_cos, k_norm_weight)
        call_by(_CACHE_NAMES, ops.check_indices, query, keys, options)
        if rotary_cos is not None or rotary_sin is not None:
            new.set_rotary(query, options, *rotary, rotary_seqlens, rotary_interleaved)
        new.set_norms(query, norm_eps, norms)
        done = call_by(
            *(_CACHE_NAMES, decode_plans.launch_with_new_keys, given),
            *(query, keys, values, qv, s_aux, out, options, new.for_one_launch(query, options)),
        )
        if done is not None:
            return _with_no_splits(*done) if return_softmax_lse else done[0]
        query, options, appended = call_by(_CACHE_NAMES, new.append, query, options)
    backend = plan_cache.backend_of(query, keys, values, qv, s_aux, options, out)
    attended = (query, keys, values, qv, s_aux, out, options, backend)
    if not appends or appended is not None:
        done = call_by(_CACHE_NAMES, decode_plans.launch, given, *attended, appended)
        if done is not None:
            return _with_no_splits(*done) if return_softmax_lse else done[0]
    if not appends:
        done = plan_cache.launch(of_forward, options, return_softmax_lse, backend)
        if done is not None:
            return _with_no_splits(*done) if return_softmax_lse else done
    result = call_by(_CACHE_NAMES, ops.run_forward, *attended)
    return (*result,) if return_softmax_lse else result.out


def _as_forward_call(given: Arguments) -> Arguments:
    """By the names of `Options`, without new keys: for the plans of the forward kernel."""
    return {_OWN_NAMES.get(name, name): x for name, x in given.items() if name not in ("k", "v")}


def _with_no_splits(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """O, LSE and the empty results of splits, as `ops.run_forward` gives them."""
    none = decode_plans.no_splits(lse.device)
    return out, lse, none, none


def _cast_for_autocast(k_cache: Any, *inputs: Any) -> tuple[Any, ...]:
    """The inputs as autocast would have them, if the cache is that already: its own dtype, or e4m3.
    A cache is never cast, it is written in place."""
    cast = cast_for_autocast(*inputs)
    dtype = getattr(cast[0], "dtype", None)
    return cast if getattr(k_cache, "dtype", None) in (dtype, checks.FP8) else inputs


def _lengths(q: Any, k_cache: Any, cache_seqlens: Any, cu_seqlens_q: Any) -> Tensor | None:
    """cache_seqlens as an int32 (batch,) tensor; its shape is checked with all the others."""
    if cache_seqlens is None:
        return None
    if isinstance(cache_seqlens, Tensor):
        given: Tensor = to_int32(require_tensor("cache_seqlens", cache_seqlens, INDEX_DTYPES))
        return given
    length = require_int("cache_seqlens", cache_seqlens, minimum=0, maximum=2**31 - 1)
    require_tensor("q", q, checks.INPUT_DTYPES)
    if cu_seqlens_q is not None:
        require_tensor("cu_seqlens_q", cu_seqlens_q, INDEX_DTYPES)
        batch = cu_seqlens_q.shape[0] - 1
    else:
        batch = q.shape[0]
    return torch.full((batch,), length, dtype=torch.int32, device=q.device)


def _refuse_without_new_keys(
    cu_seqlens_k_new: Any, rotary: tuple[Any, Any], norms: dict[str, Any]
) -> None:
    if cu_seqlens_k_new is not None:
        raise ValueError("cu_seqlens_k_new needs k and v to append, got k=None and v=None")
    if any(x is not None for x in rotary):
        raise ValueError(
            "rotary_cos and rotary_sin need k and v to append, got k=None and v=None; "
            "rotate q beforehand"
        )
    for name, weight in norms.items():
        if weight is not None:
            raise ValueError(
                f"{name}_norm_weight needs k and v to append, got k=None and v=None; normalise q "
                "beforehand"
            )


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Merges partial attention results over disjoint sets of keys. Differentiable.

    Args:
        out_partial: fp32 (splits, batch, seqlen, heads, head_dim_v), or without batch.
        lse_partial: fp32 (splits, batch, seqlen, heads), or without batch. -inf where a split has
            seen no key.
        out: where to write O, no gradients then.
        out_dtype: dtype of O: fp32 (default), fp16 or bf16.

    Returns:
        (O, LSE): O (batch, seqlen, heads, head_dim_v), LSE (batch, seqlen, heads), natural
        logarithm.
    """
    floats = (torch.float32, torch.float64)
    require_tensor("out_partial", out_partial, floats)
    require_tensor("lse_partial", lse_partial, out_partial.dtype, out_partial)
    if out_partial.dim() not in (4, 5):
        raise ValueError(
            "out_partial must have shape (splits, batch, seqlen, heads, head_dim_v) or "
            f"(splits, total, heads, head_dim_v), got {tuple(out_partial.shape)}"
        )
    require_shape("lse_partial", lse_partial, tuple(out_partial.shape[:-1]), "(splits, ..., heads)")
    if not 1 <= out_partial.shape[0] <= checks.MAX_SPLITS:
        raise ValueError(
            f"out_partial must have from 1 to {checks.MAX_SPLITS} splits, "
            f"got {out_partial.shape[0]}"
        )
    dtypes = (out_partial.dtype, torch.float32, torch.float16, torch.bfloat16)
    if out_dtype is not None and out_dtype not in dtypes:
        raise TypeError(f"out_dtype must be float32, float16 or bfloat16, got {out_dtype}")
    if out is not None:
        require_tensor("out", out, dtypes if out_dtype is None else out_dtype, out_partial)
        require_shape("out", out, tuple(out_partial.shape[1:]), "out_partial's without splits")
        memory.require_writable("out", out)
        if derivatives.is_differentiated(out, out_partial, lse_partial):
            raise ValueError(
                "out= cannot be combined with tensors that require grad or carry a tangent"
            )
        out_dtype = out.dtype
    merged, lse = combine.combine(out_partial, lse_partial, out_dtype)
    if out is None:
        return merged, lse
    out.copy_(merged)
    return out, lse
