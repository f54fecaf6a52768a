"""The public attention functions: FlashAttention-3's names, argument order and defaults.

Each one names its arguments for `attend`. That launches by the plan cache, or has them checked into
`Options` and calls one torch op, so autograd, torch.compile and the choice of a backend live in one
place (`flash8.ops`). What FA3 does not have is keyword-only.

The maths is that of Dao et al., "FlashAttention" (arXiv 2205.14135) and Shah et al.,
"FlashAttention-3" (arXiv 2407.08608). For query i and key j of a sequence with sq queries and
sk keys (the used lengths):

    S = softmax_scale * (q_i . k_j [+ qv_i . v_j])      with descales for float8 inputs
    S = softcap * tanh(S / softcap)                     if softcap > 0
    S = S - alibi_slope * |i + sk - sq - j|             if alibi_slopes is given
    S = -inf                                            where the mask hides j from i
    LSE = log(sum_j exp(S) [+ exp(s_aux)])
    O = sum_j dropout(exp(S - LSE)) v_j
"""

from typing import Any

from torch import Tensor

from flash8.call import checks
from flash8.call.autocast import cast_for_autocast
from flash8.call.observed import is_autocast_on
from flash8.call.options import Arguments, Options
from flash8.call.unwrap import unwrap
from flash8.ops import attention as ops
from flash8.ops import decode_plans, plan_cache, unseen
from flash8.scheduler import check_metadata, choice_on_device
from flash8.tensors.arguments import OWN_NAMES, Names, call_by, require_bool
from flash8.tensors.philox import draw_seed
from flash8.tensors.scaled_tensor import Input

Output = Tensor | tuple[Tensor, Tensor]
Window = tuple[int, int]


def flash_attn_func(
    q: Input,
    k: Input,
    v: Input,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    out: Tensor | None = None,
    k_mean: Tensor | None = None,
    v_mean: Tensor | None = None,
    v_channel_descale: Tensor | None = None,
    smooth_k: bool = False,
) -> Output:
    """Attention over dense batches. Differentiable in q, k, v, qv, s_aux and through LSE.

    Args:
        q: (batch, seqlen_q, heads, head_dim), bf16, fp16 or float8_e4m3fn; on CPU tensors fp32
            and fp64 too.
        k: (batch, seqlen_k, heads_kv, head_dim); heads_kv divides heads (GQA, MQA). Of q's dtype,
            or float8_e4m3fn.
        v: (batch, seqlen_k, heads_kv, head_dim_v), of k's dtype. q, k and v may be ScaledTensors
            of `flash8.fp8.quantize`, which bring their descales and means.
        softmax_scale: factor of the scores, default head_dim ** -0.5, and
            (head_dim + head_dim_v) ** -0.5 with qv.
        causal: query i sees keys j <= i + seqlen_k - seqlen_q (bottom-right aligned).
        qv: (batch, seqlen_q, heads, head_dim_v), added to the scores as qv . v.
        q_descale, k_descale, v_descale: fp32, only for float8: x ~ descale * x_fp8 (+ mean). A
            scalar, (batch, heads_kv), for q also (batch, heads), or one per 128 tokens,
            (batch, heads, ceil(seqlen / 128)); `flash8.tensors.descales` has the shapes of other
            layouts.
        window_size: (left, right), inclusive: query i sees keys from i + seqlen_k - seqlen_q - left
            to i + seqlen_k - seqlen_q + right; -1 is unbounded.
        attention_chunk: if positive, queries see only keys of their own chunk of this many keys.
        softcap: if positive, scores are capped by softcap * tanh(S / softcap).
        num_splits: KV splits whose partial results are combined; 0 chooses.
        pack_gqa, sm_margin: scheduling hints for the GPU, without effect on the result.
        deterministic: bitwise repeatable gradients (always so on CPU tensors).
        return_attn_probs: FA3's name for: return LSE too.
        s_aux: (heads,) learnable attention sinks: one more logit per head, without a value.
        alibi_slopes: fp32 (heads,) or (batch, heads). Not differentiable.
        dropout_p: probability to drop an attention weight, in [0, 1).
        dropout_seed: int or int64 tensor that fixes the mask (see `flash8.dropout_mask`);
            None draws one from torch's default generator.
        out: where to write O, no gradients then.
        k_mean, v_mean: fp32 (heads_kv, d) or (batch, heads_kv, d), only with float8 k and v: what
            was taken from k and v before they were quantized. O and LSE are those of the whole.
        v_channel_descale: fp32 (heads_kv, head_dim_v) or (batch, heads_kv, head_dim_v), only with
            float8 v: factors of v's channels, beside v_descale.
        smooth_k: make dQ with K - c, c the mean of K over the used keys of each sequence and head,
            and add what that leaves out. O, LSE and the other gradients stay as they are. For keys
            whose channels have a bias: rounded to 16 bits, dS no longer sums to what it should,
            and dQ = dS K collects that error times the bias. In exact arithmetic
                dQ = softmax_scale * (dS (K - c) + rowsum(dS) c)
                rowsum(dS) = dLSE + p_sink * (rowsum(dO * O) - dLSE),  p_sink = exp(s_aux - LSE)
            since rows of P sum to 1 - p_sink (0 without a sink), so with the first product rounded
            and the second known, c costs nothing. Not with softcap, and not for float8.

    Returns:
        O, (batch, seqlen_q, heads, head_dim_v), in q's dtype, bf16 for float8; with
        return_attn_probs (O, LSE), LSE (batch, heads, seqlen_q) fp32 (fp64 for fp64 inputs),
        natural logarithm. A query that sees no key gets O = 0 and LSE = -inf (s_aux if given).

    Raises:
        TypeError, ValueError: naming the argument, its value and what is supported.
    """
    arguments: Arguments = {
        "q": q,
        "k": k,
        "v": v,
        "qv": qv,
        "s_aux": s_aux,
        "out": out,
        "q_descale": q_descale,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "k_mean": k_mean,
        "v_mean": v_mean,
        "v_channel_descale": v_channel_descale,
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "attention_chunk": attention_chunk,
        "softcap": softcap,
        "num_splits": num_splits,
        "pack_gqa": pack_gqa,
        "deterministic": deterministic,
        "sm_margin": sm_margin,
        "smooth_k": smooth_k,
    }
    return attend(arguments, dropout_seed=dropout_seed, return_lse=return_attn_probs)


def flash_attn_varlen_func(
    q: Input,
    k: Input,
    v: Input,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    page_table: Tensor | None = None,
    s_aux: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    out: Tensor | None = None,
    k_mean: Tensor | None = None,
    v_mean: Tensor | None = None,
    v_channel_descale: Tensor | None = None,
    smooth_k: bool = False,
    scheduler_metadata: Tensor | None = None,
) -> Output:
    """Attention over sequences of different lengths, packed one after the other.

    Args as in `flash_attn_func`, and:
        q: (total_q, heads, head_dim); with cu_seqlens_q=None (batch, seqlen_q, heads, head_dim).
        k, v: (total_k, heads_kv, head_dim[_v]); with cu_seqlens_k=None
            (batch, seqlen_k, heads_kv, head_dim[_v]), or with page_table
            (pages, page_size, heads_kv, head_dim[_v]).
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,): sequence b has rows
            cu_seqlens[b] to cu_seqlens[b + 1]; starts with 0, never decreases. int64 indices, here
            and below, are converted, without a wait.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        seqused_q, seqused_k: int32 (batch,): only so many rows of each sequence are used. The rows
            past them are not read, get O = 0 and LSE = -inf, and zero gradients.
        page_table: int32 (batch, max_pages): the pages of each sequence, in order; needs seqused_k.
            Of pages that the mask hides from every query neither number nor contents are looked at.
            num_splits is then as in `flash_attn_with_kvcache`: for a few queries over long caches
            pass 0, since 1 (FA3's default) splits no sequence.
        scheduler_metadata: as in `flash_attn_with_kvcache`, with page_table on a GPU. It makes no
            difference elsewhere, but that num_splits above 1 is a bound on any GPU.

    Returns:
        O in q's layout with head_dim_v last; with return_attn_probs (O, LSE), LSE (heads, total_q)
        for packed q, (batch, heads, seqlen_q) otherwise.
    """
    arguments: Arguments = {
        "q": q,
        "k": k,
        "v": v,
        "qv": qv,
        "s_aux": s_aux,
        "out": out,
        "q_descale": q_descale,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "k_mean": k_mean,
        "v_mean": v_mean,
        "v_channel_descale": v_channel_descale,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "seqused_q": seqused_q,
        "seqused_k": seqused_k,
        "page_table": page_table,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "attention_chunk": attention_chunk,
        "softcap": softcap,
        "num_splits": num_splits,
        "pack_gqa": pack_gqa,
        "deterministic": deterministic,
        "sm_margin": sm_margin,
        "smooth_k": smooth_k,
    }
    if scheduler_metadata is not None:
        arguments["scheduler_metadata"] = scheduler_metadata
    return attend(arguments, dropout_seed=dropout_seed, return_lse=return_attn_probs)


def attend(
    arguments: Arguments, *, dropout_seed: Any, return_lse: bool, names: Names = OWN_NAMES
) -> Output:
    """Runs a call: by the plan cache, or checked. The arguments become what was made of them;
    names: what the caller calls them."""
    if return_lse is not False:
        require_bool("return_attn_probs", return_lse)
    if is_autocast_on():
        arguments = _cast_for_autocast(arguments)
    p = arguments.get("dropout_p")
    if type(p) is float and 0.0 < p < 1.0:
        arguments = _with_seed(arguments, dropout_seed)
    key = unseen.key(arguments) if dropout_seed is None else None  # None where kernels are wanted
    known = unseen.find(key)
    if known is not None:
        o, lse = ops.run_unseen(arguments, known)
        return (o, lse) if return_lse else o
    may_be_cached = dropout_seed is None or "dropout_seed" in arguments
    find = plan_cache.find if arguments.get("page_table") is None else _find_over_pages
    done = find(arguments, return_lse) if may_be_cached else None
    if done is not None:
        return done  # type: ignore[no-any-return]
    for plain in (unwrap, checks.narrowed):  # a plan points to plain tensors and int32 indices
        others = plain(arguments)
        if others:
            arguments.update(others)
            done = find(arguments, return_lse) if may_be_cached else None
            if done is not None:
                return done  # type: ignore[no-any-return]
    q, k, v, qv = arguments["q"], arguments["k"], arguments["v"], arguments.get("qv")
    s_aux, out = arguments.get("s_aux"), arguments.get("out")
    window_left, window_right = checks.window(arguments["window_size"])
    options = Options.of(arguments)._replace(window_left=window_left, window_right=window_right)
    geometry, options = checks.attention(q, k, v, qv, s_aux, out, options, names)
    if (metadata := arguments.get("scheduler_metadata")) is not None:
        check_metadata(metadata, q, geometry)
        options = options._replace(num_splits=choice_on_device(q, options))
    if options.dropout_seed is None:
        seed = None
        if dropout_seed is not None:
            seed = checks.dropout_seed_tensor(dropout_seed, q.device)
        if options.dropout_p > 0.0:
            options = options._replace(dropout_seed=draw_seed(q.device) if seed is None else seed)
            may_be_cached = False  # a plan points to arguments only
    options = ops.resolve_num_splits(q, geometry, options)
    unseen.keep(key, (q, k, v, s_aux), options)
    backend = plan_cache.backend_of(q, k, v, qv, s_aux, options, out)
    if may_be_cached:
        done = plan_cache.launch(arguments, options, return_lse, backend)
        if done is None and options.page_table is not None:
            given = decode_plans.as_cache_call(arguments, return_lse)
            done = decode_plans.launch(given, q, k, v, qv, s_aux, out, options, backend)
            done = done if done is None or return_lse else done[0]
        if done is not None:
            return done
    o, lse, _, _ = call_by(names, ops.run_forward, q, k, v, qv, s_aux, out, options, backend)
    return (o, lse) if return_lse else o


def _find_over_pages(arguments: Arguments, return_lse: bool) -> Any:
    """`plan_cache.find`, where the plan may be the decode kernel's."""
    given = decode_plans.as_cache_call(arguments, return_lse)
    done = decode_plans.run(arguments["q"])(**given)
    if not isinstance(done, tuple):
        return plan_cache.find(arguments, return_lse)
    return done if return_lse else done[0]


def _with_seed(arguments: Arguments, dropout_seed: Any) -> Arguments:
    """With the seed of dropout as one more argument, a tensor that a plan may point to, where the
    call is for kernels. Where none is given it is drawn."""
    q = arguments["q"]
    if not plan_cache.may_launch(q):
        return arguments
    if dropout_seed is None:
        seed = draw_seed(q.device)
    else:
        seed = checks.dropout_seed_tensor(dropout_seed, q.device)
    return {**arguments, "dropout_seed": seed}


def _cast_for_autocast(arguments: Arguments) -> Arguments:
    q, k, v, qv = cast_for_autocast(
        arguments["q"], arguments["k"], arguments["v"], arguments.get("qv")
    )
    return {**arguments, "q": q, "k": k, "v": v, "qv": qv}
