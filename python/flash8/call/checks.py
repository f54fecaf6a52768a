"""Every check of an attention call that needs no look at the data of a tensor.

`attention` is called by each public function before any op: it turns bad input into a TypeError
or ValueError and returns the normalised `Options`. What can only be seen in the data (cumulative
lengths, page indices) is checked by the CPU backend when it reads them.
"""

from typing import Any

import torch
from torch import Tensor

from flash8.call import check_descales, derivatives, suspicions
from flash8.call.geometry import Geometry
from flash8.call.options import Arguments, Options
from flash8.tensors import descales, memory
from flash8.tensors.arguments import (
    INDEX_DTYPES,
    OWN_NAMES,
    Names,
    describe,
    differ,
    require_bool,
    require_float,
    require_int,
    require_rank,
    require_shape,
    require_tensor,
    to_int32,
)
from flash8.tensors.float8 import E4M3

FP8 = E4M3
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, FP8)
MAX_HEAD_DIM = 512
MAX_SPLITS = 256
TREE_KEYS = 32  # bits of a word of tree_mask
_SPLIT_UNIT = 64  # keys: every kernel's tiles divide them
_INT32_MAX = 2**31 - 1
NO_SPLIT = _INT32_MAX // _SPLIT_UNIT * _SPLIT_UNIT  # split_keys that no sequence is longer than
_INDEX_FIELDS = (
    *("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"),
    *("leftpad_k", "page_table", "kv_batch_idx"),
)
_MAX_SCALE = 1e30  # finite in fp32, and so are its products with small scores
_MIN_SOFTCAP = 1e-30  # its inverse is finite in fp32


def attention(
    q: Any,
    k: Any,
    v: Any,
    qv: Any,
    s_aux: Any,
    out: Any,
    options: Options,
    names: Names = OWN_NAMES,
) -> tuple[Geometry, Options]:
    """Checks one attention call. `options` may hold raw user values; the result is normalised."""
    suspicions.refuse_other_order(options)
    options = options._replace(**narrowed(options._asdict()))
    geometry = qkv(q, k, v, options, names)
    if qv is not None:
        _check_qv(q, qv, geometry, options, names)
    _check_index_tensors(q, geometry, options, names)
    if s_aux is not None:
        require_tensor("s_aux", s_aux, (torch.float32, torch.float64, q.dtype), q)
        require_shape("s_aux", s_aux, (geometry.heads,), "(heads,)")
    _check_alibi(q, geometry, options.alibi_slopes)
    if out is not None:
        inputs = {"q": q, "k": k, "v": v, "qv": qv, "s_aux": s_aux}
        _check_out(out, inputs, options, geometry, names)
    options = scalars(options, names)
    options = options._replace(tree_mask=_tree_mask(q, geometry, options))
    suspicions.warn_about_scale(options.softmax_scale, geometry.head_dim)
    if options.smooth_k and k.dtype == FP8:
        raise ValueError(
            "smooth_k is for the backward, which float8 inputs have not; smooth_k of "
            "flash8.fp8.quantize and of its recipes takes K's mean off before it is quantized"
        )
    if options.is_scaled:
        check_descales.check(q, k, geometry, options)
    return geometry, options


def narrowed(arguments: Arguments) -> Arguments:
    """int32 indices for those that are int64. Empty if there are none."""
    indices = {}
    for name in _INDEX_FIELDS:
        index = arguments.get(name)
        if isinstance(index, Tensor) and index.dtype == torch.int64:
            indices[name] = to_int32(index)
    return indices


def qkv(q: Any, k: Any, v: Any, options: Options, names: Names = OWN_NAMES) -> Geometry:
    """Checks dtype, device and shape of q, k and v against each other."""
    q_name, k_name, v_name = (names.get(name, name) for name in ("q", "k", "v"))
    require_tensor(q_name, q, INPUT_DTYPES)
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{q_name} must be on a cpu or cuda device, got {q.device}")
    require_tensor(k_name, k, q.dtype if q.dtype == FP8 else (q.dtype, FP8), q)
    require_tensor(v_name, v, k.dtype, q)
    q_packed = options.cu_seqlens_q is not None
    k_packed = options.cu_seqlens_k is not None
    paged = options.page_table is not None
    if paged and k_packed:
        raise ValueError(
            "page_table and cu_seqlens_k cannot be combined: a paged cache takes its lengths from "
            "seqused_k (cache_seqlens); pass cu_seqlens_k=None"
        )
    if paged and options.seqused_k is None:
        used = names.get("seqused_k", "seqused_k")
        raise ValueError(f"page_table needs {used}: the used length of every sequence, got None")
    if q_packed:
        require_rank(q_name, q, 3, "(total_q, heads, head_dim) when cu_seqlens_q is given")
    else:
        require_rank(q_name, q, 4, "(batch, seqlen_q, heads, head_dim)")
    for name, x in ((k_name, k), (v_name, v)):
        if k_packed:
            require_rank(name, x, 3, "(total_k, heads_kv, head_dim) when cu_seqlens_k is given")
        elif paged:
            require_rank(name, x, 4, "(pages, page_size, heads_kv, head_dim) with page_table")
        else:
            require_rank(name, x, 4, "(batch, seqlen_k, heads_kv, head_dim)")
    geometry = Geometry(
        batch=_batch_size(q, options, names),
        heads=q.shape[-2],
        heads_kv=k.shape[-2],
        head_dim=q.shape[-1],
        head_dim_v=options.head_dim_v(v),
        q_packed=q_packed,
        k_packed=k_packed,
        paged=paged,
    )
    _check_sizes(q, k, v, geometry, options, names)
    return geometry


def _batch_size(q: Tensor, options: Options, names: Names) -> int:
    cu_seqlens = options.cu_seqlens_q
    if cu_seqlens is None:
        return q.shape[0]
    name = names.get("cu_seqlens_q", "cu_seqlens_q")
    require_tensor(name, cu_seqlens, INDEX_DTYPES, q)
    require_rank(name, cu_seqlens, 1, "(batch + 1,)")
    if cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} must have batch + 1 elements, at least 1, got 0")
    return cu_seqlens.shape[0] - 1


def _check_sizes(
    q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, options: Options, names: Names
) -> None:
    q_name, k_name, v_name = (names.get(name, name) for name in ("q", "k", "v"))
    head_dim, head_dim_v = geometry.head_dim, geometry.head_dim_v
    place_v = "last" if options.v_colmajor_tokens is None else "second last"
    for name, size, place in (
        (f"{q_name} (head_dim)", head_dim, "last"),
        (f"{v_name} (head_dim_v)", head_dim_v, place_v),
    ):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(
                f"the {place} dimension of {name} must be from 1 to {MAX_HEAD_DIM}, got {size}"
            )
    if k.shape[-1] != head_dim:
        raise ValueError(
            f"{k_name} must have {q_name}'s head_dim {head_dim}, got shape {tuple(k.shape)}"
        )
    if options.v_colmajor_tokens is not None:
        _check_v_colmajor(k, v, geometry, options, names)
    elif differ(k.shape[:-1], v.shape[:-1]):
        raise ValueError(
            f"{v_name} must have {k_name}'s shape but for its last dimension, "
            f"got {k_name} {tuple(k.shape)} and {v_name} {tuple(v.shape)}"
        )
    heads, heads_kv = geometry.heads, geometry.heads_kv
    if heads < 1 or heads_kv < 1 or heads % heads_kv != 0:
        raise ValueError(
            f"the heads of {q_name} must be a positive multiple of the heads of {k_name}, "
            f"got {heads} and {heads_kv}"
        )
    dense_k = not geometry.k_packed and not geometry.paged
    if dense_k and options.kv_batch_idx is None and differ(k.shape[:1], (geometry.batch,)):
        raise ValueError(
            f"{k_name} must have the batch size {geometry.batch} of {q_name}, got {k.shape[0]}"
        )
    if geometry.paged and k.shape[1] < 1:
        raise ValueError(
            f"{k_name} must have a page_size of at least 1, got shape {tuple(k.shape)}"
        )


def _check_v_colmajor(
    k: Tensor, v: Tensor, geometry: Geometry, options: Options, names: Names
) -> None:
    """A v_colmajor v, (batch, heads_kv, head_dim_v, 128 * blocks), belongs to k's tokens."""
    name = names.get("v", "v")
    if geometry.paged:
        raise ValueError(f"a v_colmajor {name} cannot be combined with page_table")
    tokens, heads = k.shape[-3:-1]
    if geometry.k_packed:
        blocks = descales.num_packed_blocks(tokens, geometry.batch)
    else:
        blocks = descales.num_blocks(tokens)
    shape = (*k.shape[:-3], heads, geometry.head_dim_v, descales.BLOCK * blocks)
    if options.v_colmajor_tokens != tokens or v.shape != shape:
        raise ValueError(
            f"a v_colmajor {name} must be of k's {tokens} tokens and {heads} heads, shape {shape}, "
            f"got {options.v_colmajor_tokens} tokens in shape {tuple(v.shape)}"
        )


def _check_qv(q: Tensor, qv: Any, geometry: Geometry, options: Options, names: Names) -> None:
    if q.dtype == FP8:
        raise ValueError(
            f"qv is not supported with {FP8} {names.get('q', 'q')}; use torch.bfloat16 or "
            "torch.float16"
        )
    for name in ("k_mean", "v_mean", "v_channel_descale"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name} cannot be combined with qv, which makes v a key, too")
    require_tensor("qv", qv, q.dtype, q)
    shape = (*q.shape[:-1], geometry.head_dim_v)
    require_shape("qv", qv, shape, "q's shape with head_dim_v last")


def _check_index_tensors(q: Tensor, geometry: Geometry, options: Options, names: Names) -> None:
    batch = geometry.batch
    for side in ("q", "k"):
        field, longest = f"cu_seqlens_{side}", f"max_seqlen_{side}"
        name, cu_seqlens = names.get(field, field), getattr(options, field)
        if cu_seqlens is not None:
            require_tensor(name, cu_seqlens, INDEX_DTYPES, q)
            require_shape(name, cu_seqlens, (batch + 1,), "(batch + 1,)")
            if getattr(options, longest) is None:
                raise ValueError(
                    f"{names.get(longest, longest)} must be given with {name}, got None"
                )
    for field in ("seqused_q", "seqused_k", "leftpad_k", "kv_batch_idx"):
        tensor, name = getattr(options, field), names.get(field, field)
        if tensor is not None:
            require_tensor(name, tensor, INDEX_DTYPES, q)
            require_shape(name, tensor, (batch,), "(batch,)")
    if options.kv_batch_idx is not None and geometry.k_packed:
        raise ValueError(
            f"{names.get('kv_batch_idx', 'kv_batch_idx')} cannot be combined with cu_seqlens_k: "
            "it selects rows of a dense or paged cache"
        )
    if options.page_table is not None:
        require_tensor("page_table", options.page_table, INDEX_DTYPES, q)
        require_rank("page_table", options.page_table, 2, "(batch, max_pages)")
        rows = options.page_table.shape[:1]
        if options.kv_batch_idx is None and differ(rows, (batch,)):
            raise ValueError(f"page_table must have batch = {batch} rows, got {rows[0]}")


def _check_alibi(q: Tensor, geometry: Geometry, alibi_slopes: Any) -> None:
    if alibi_slopes is None:
        return
    require_tensor("alibi_slopes", alibi_slopes, (torch.float32, torch.float64), q)
    if alibi_slopes.dim() == 1:
        require_shape("alibi_slopes", alibi_slopes, (geometry.heads,), "(heads,)")
    else:
        shape = (geometry.batch, geometry.heads)
        require_shape("alibi_slopes", alibi_slopes, shape, "(heads,) or (batch, heads)")
    if alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes is not differentiable, got requires_grad=True; detach it")


def _tree_mask(q: Tensor, geometry: Geometry, options: Options) -> Tensor | None:
    """The mask in int32."""
    words: Any = options.tree_mask
    if words is None:
        return None
    require_tensor("tree_mask", words, (torch.int32, torch.uint32), q)
    meaning = "(total_q,)" if geometry.q_packed else "(batch, seqlen_q)"
    require_shape("tree_mask", words, tuple(q.shape[:-2]), meaning)
    queries: Any = options.max_seqlen_q if geometry.q_packed else q.shape[1]
    if queries > TREE_KEYS:
        raise ValueError(
            f"tree_mask is for up to {TREE_KEYS} queries of a sequence, a bit for each, got "
            f"{'max_seqlen_q = ' if geometry.q_packed else 'q with '}{queries}"
        )
    seen: Tensor = words.view(torch.int32)
    return seen


def output_dtype(q: Tensor) -> torch.dtype:
    """The dtype of O: that of q, bfloat16 for FP8."""
    return torch.bfloat16 if q.dtype == FP8 else q.dtype


def lse_dtype(q: Tensor) -> torch.dtype:
    """The dtype of LSE: float32, float64 for float64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _check_out(
    out: Any, inputs: dict[str, Any], options: Options, geometry: Geometry, names: Names
) -> None:
    q = inputs["q"]
    allowed = (torch.bfloat16, torch.float16) if q.dtype == FP8 else (q.dtype,)
    require_tensor("out", out, allowed, q)
    shape = (*q.shape[:-1], geometry.head_dim_v)
    require_shape("out", out, shape, "q's shape with head_dim_v last")
    memory.require_writable("out", out)
    given = [x for x in inputs.values() if x is not None]
    if derivatives.is_differentiated(*given, out):
        raise ValueError(
            "out= cannot be combined with tensors that require grad or carry a tangent; "
            "leave out=None, or call under torch.no_grad()"
        )
    if torch.compiler.is_compiling():
        return
    for name, x in {**inputs, **options._asdict()}.items():
        if isinstance(x, Tensor) and memory.is_shared(out, [x]):
            raise ValueError(
                f"out must not share memory with {names.get(name, name)}: it is written while the "
                "arguments are read"
            )


def check_dropout_p(dropout_p: Any) -> float:
    value = require_float("dropout_p", dropout_p)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {value}")
    return value


def dropout_seed_tensor(seed: Any, device: torch.device) -> Tensor:
    """An int64 (1,) tensor on `device` from an int or a one-element int64 tensor."""
    if isinstance(seed, Tensor):
        require_tensor("dropout_seed", seed, torch.int64)
        if seed.numel() != 1:
            raise ValueError(f"dropout_seed must have one element, got {describe(seed)}")
        return seed.reshape(1).to(device)
    require_int("dropout_seed", seed, minimum=-(2**63), maximum=2**63 - 1)
    return torch.tensor([seed], dtype=torch.int64, device=device)


def softmax_scale(value: Any) -> float | None:
    if value is None:
        return None
    number = require_float("softmax_scale", value)
    if not 0.0 < number <= _MAX_SCALE:
        raise ValueError(
            f"softmax_scale must be greater than 0 and at most {_MAX_SCALE}, got {number}"
            + (suspicions.HINT if number == 0.0 else "")
        )
    return number


def window(window_size: Any) -> tuple[int, int]:
    """(left, right) as ints: each at least 0, or -1 for unbounded."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(
            f"window_size must be a pair (left, right) of integers, got {describe(window_size)} "
            f"({type(window_size).__name__})"
        )
    left, right = window_size
    return (
        require_int("window_size[0]", left, minimum=-1, maximum=_INT32_MAX),
        require_int("window_size[1]", right, minimum=-1, maximum=_INT32_MAX),
    )


def scalars(options: Options, names: Names = OWN_NAMES) -> Options:
    """The scalar options checked and normalised; causal becomes a right bound of 0 as well."""
    softcap = require_float("softcap", options.softcap)
    if softcap != 0.0 and not _MIN_SOFTCAP <= softcap <= _MAX_SCALE:
        raise ValueError(
            f"softcap must be 0 (off) or at least {_MIN_SOFTCAP} and at most {_MAX_SCALE}, "
            f"got {softcap}"
        )
    causal = require_bool("causal", options.causal)
    pack_gqa = options.pack_gqa
    return options._replace(
        max_seqlen_q=_max_seqlen("max_seqlen_q", options.max_seqlen_q, names),
        max_seqlen_k=_max_seqlen("max_seqlen_k", options.max_seqlen_k, names),
        dropout_p=check_dropout_p(options.dropout_p),
        softmax_scale=softmax_scale(options.softmax_scale),
        causal=causal,
        window_right=0 if causal else options.window_right,
        attention_chunk=require_int(
            "attention_chunk", options.attention_chunk, minimum=0, maximum=_INT32_MAX
        ),
        softcap=softcap,
        num_splits=require_int("num_splits", options.num_splits, minimum=0, maximum=MAX_SPLITS),
        pack_gqa=None if pack_gqa is None else require_bool("pack_gqa", pack_gqa),
        deterministic=require_bool("deterministic", options.deterministic),
        smooth_k=_smooth_k(options.smooth_k, softcap),
        split_keys=_split_keys(options),
        sm_margin=require_int("sm_margin", options.sm_margin, minimum=0, maximum=_INT32_MAX),
    )


def _split_keys(options: Options) -> int:
    keys = require_int("split_keys", options.split_keys, minimum=0, maximum=_INT32_MAX)
    if keys % _SPLIT_UNIT != 0:
        raise ValueError(f"split_keys must be a multiple of {_SPLIT_UNIT}, got {keys}")
    refuse_two_splits(keys, options.num_splits)
    return keys


def refuse_two_splits(split_keys: int, num_splits: int) -> None:
    if split_keys > 0 and num_splits > 1:
        raise ValueError(
            f"split_keys cannot be combined with num_splits = {num_splits}: it says where a "
            "sequence is split"
        )


def _smooth_k(value: Any, softcap: float) -> bool:
    if require_bool("smooth_k", value) and softcap != 0.0:
        raise ValueError(
            f"smooth_k cannot be combined with softcap = {softcap}: what a row of dS sums to is "
            "not known then"
        )
    return bool(value)


def _max_seqlen(name: str, value: Any, names: Names) -> int | None:
    if value is None:
        return None
    return require_int(names.get(name, name), value, minimum=0, maximum=_INT32_MAX)
