"""The keys and values that a KV-cache call appends: checks, rotary, quantization, the write."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash8 import backends
from flash8.backends.cpu import append as portable
from flash8.call import checks, derivatives
from flash8.call.geometry import Geometry
from flash8.call.options import Options
from flash8.call.request import Appended, Queries
from flash8.ops import attention as ops
from flash8.ops import plan_cache
from flash8.tensors import memory
from flash8.tensors.arguments import (
    INDEX_DTYPES,
    call_by,
    require_float,
    require_rank,
    require_shape,
    require_tensor,
    to_int32,
)
from flash8.tensors.descales import is_per_token
from flash8.tensors.float8 import E4M3
from flash8.tensors.rms_norm import Norm
from flash8.tensors.rotary import Rope, token_positions

if TYPE_CHECKING:
    from flash8.backends.hopper import append as hopper
    from flash8.backends.hopper.decode_append import NewRows

#: What `checks` and `flash_attn_with_kvcache` call the same arguments, where lengths are those
#: after the append.
_LENGTHENED_NAMES = {
    "k": "k_cache",
    "v": "v_cache",
    "seqused_k": "cache_seqlens, with the appended rows,",
    "leftpad_k": "cache_leftpad",
    "kv_batch_idx": "cache_batch_idx",
}


class NewKeys:
    """The keys and values that a call appends, checked."""

    def __init__(
        self,
        k: Any,
        v: Any,
        cu_seqlens: Any,
        k_cache: Tensor,
        v_cache: Tensor,
        geometry: Geometry,
        options: Options,
    ) -> None:
        if k is None or v is None:
            missing = "k" if k is None else "v"
            raise ValueError(f"k and v must be given together, got {missing}=None")
        if options.seqused_k is None:
            raise ValueError("k and v need cache_seqlens: where to append, got None")
        memory.require_writable("k_cache", k_cache)
        memory.require_writable("v_cache", v_cache)
        self._k_cache, self._v_cache, self._cu_seqlens = k_cache, v_cache, to_int32(cu_seqlens)
        self._starts = options.seqused_k
        if cu_seqlens is not None:
            require_tensor("cu_seqlens_k_new", cu_seqlens, INDEX_DTYPES, k_cache)
            require_shape("cu_seqlens_k_new", cu_seqlens, (geometry.batch + 1,), "(batch + 1,)")
        for name, new, head_dim in (("k", k, geometry.head_dim), ("v", v, geometry.head_dim_v)):
            self._check_new(name, new, head_dim, geometry)
        if v.shape[:-2] != k.shape[:-2]:
            raise ValueError(
                f"v must have as many new rows as k {tuple(k.shape)}, got {tuple(v.shape)}"
            )
        self._quantizes = k.dtype != E4M3 and k_cache.dtype == E4M3
        self._k_descale = self._descale("k", options.k_descale)
        self._v_descale = self._descale("v", options.v_descale)
        if k_cache.dtype == E4M3 and (v.dtype == E4M3) == self._quantizes:
            raise TypeError(f"v must have k's dtype {k.dtype}, got {v.dtype}")
        self._k, self._v = k, v
        self._rope: Rope | None = None
        self._norms: dict[str, Norm] = {}

    def _descale(self, name: str, descale: Tensor | None) -> Tensor | None:
        """What quantizes new rows."""
        if not is_per_token(descale, self._k_cache):
            return descale
        if self._quantizes:
            raise ValueError(
                f"{name} must be {E4M3} where {name}_descale has a value for each token: quantize "
                f"it, and write its descales where its tokens go"
            )
        return None

    def _check_new(self, name: str, new: Any, head_dim: int, geometry: Geometry) -> None:
        dtype = self._k_cache.dtype
        require_tensor(name, new, checks.INPUT_DTYPES if dtype == E4M3 else dtype, self._k_cache)
        heads_kv = geometry.heads_kv
        if self._cu_seqlens is not None:
            require_rank(name, new, 3, "(total_new, heads_kv, head_dim) with cu_seqlens_k_new")
            rows: tuple[int, ...] = (new.shape[0],)
            meaning = "(total_new, heads_kv, head_dim)"
        else:
            require_rank(name, new, 4, "(batch, seqlen_new, heads_kv, head_dim)")
            rows = (geometry.batch, new.shape[1])
            meaning = "(batch, seqlen_new, heads_kv, head_dim)"
        require_shape(name, new, (*rows, heads_kv, head_dim), meaning)

    def refuse_overlap(self, q: Tensor, qv: Tensor | None) -> None:
        """A cache is written before the rest is read: what shares its memory would change."""
        if torch.compiler.is_compiling():
            return
        given = {"q": q, "qv": qv, "k": self._k, "v": self._v}
        caches = {"k_cache": self._k_cache, "v_cache": self._v_cache}
        for name, x in given.items():
            for cache_name, cache in caches.items():
                if x is not None and memory.spans_meet(x, cache):
                    raise ValueError(f"{name} must not share memory with {cache_name}; clone it")
        if memory.elements_meet(self._k_cache, self._v_cache):
            raise ValueError("v_cache must not share memory with k_cache: both are written")

    def refuse_gradients(self, *tensors: Tensor | None) -> None:
        everything = (*tensors, self._k, self._v, self._k_cache, self._v_cache)
        if derivatives.is_differentiated(*everything):
            raise ValueError(
                "flash_attn_with_kvcache appends k and v in place and has no backward then, and no "
                "tangents; call it under torch.no_grad(), or pass tensors that do not require grad"
            )

    def refuse_rotated_cache(self, *changes: Any) -> None:
        if self._quantizes or any(x is not None for x in changes):
            raise ValueError(
                "k_cache is rotated (hadamard), so new keys must come rotated and quantized: pass "
                f"k and v as {E4M3}, without rotary_cos, rotary_sin and k_norm_weight"
            )

    def set_rotary(
        self,
        q: Tensor,
        options: Options,
        cos: Any,
        sin: Any,
        rotary_seqlens: Any,
        interleaved: bool,
    ) -> None:
        """The new keys and the queries are to be rotated."""
        offsets = self._starts
        if rotary_seqlens is not None:
            offsets = to_int32(require_tensor("rotary_seqlens", rotary_seqlens, INDEX_DTYPES, q))
            require_shape("rotary_seqlens", offsets, tuple(self._starts.shape), "(batch,)")
        _check_rotary(q, cos, sin)
        self._rope = Rope(cos, sin, offsets, interleaved)
        if q.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_positions(q, self._rope, options)

    def set_norms(self, q: Tensor, eps: Any, weights: dict[str, Any]) -> None:
        """The queries and the new keys, by name, are to be normalised."""
        eps = require_float("norm_eps", eps)
        most = torch.finfo(torch.float32).max
        if not 0.0 <= eps <= most:
            raise ValueError(f"norm_eps must be from 0 to {most:.3g}, got {eps}")
        for side, weight in weights.items():
            x, name = q if side == "q" else self._k, f"{side}_norm_weight"
            if weight is None:
                continue
            if x.dtype == E4M3:
                raise TypeError(f"{name} needs a {side} that is not {E4M3} yet")
            require_tensor(name, weight, tuple(dict.fromkeys((x.dtype, torch.float32))), q)
            require_shape(name, weight, (x.shape[-1],), "(head_dim,)")
            self._norms[side] = Norm(weight, eps)

    def _check_positions(self, q: Tensor, rope: Rope, options: Options) -> None:
        """That every position has a row in the tables. Reads data, so of CPU tensors only."""
        offsets = rope.offsets
        assert offsets is not None
        if options.kv_batch_idx is not None:  # rows without work have no position
            offsets = offsets.masked_fill(options.kv_batch_idx < 0, 0)
        advance = options.causal or options.is_local
        for positions in (
            token_positions(q, offsets, options.cu_seqlens_q, advance=advance),
            token_positions(self._k, offsets, self._cu_seqlens),
        ):
            if positions.numel() == 0:
                continue
            first, last = positions.min().item(), positions.max().item()
            if first < 0 or last >= rope.cos.shape[0]:
                raise ValueError(
                    f"rotary_cos must have a row for every position from {first} to {last}, "
                    f"got {rope.cos.shape[0]} rows"
                )

    def for_one_launch(self, q: Tensor, options: Options) -> "NewRows | None":
        """What a decode kernel is given that appends itself; None where the rows are for none."""
        if not plan_cache.may_launch(q):
            return None
        from flash8.backends.hopper import append as hopper
        from flash8.backends.hopper.decode_append import NewRows

        both = self._appended(options)
        queries = self._queries(q, options) or Queries(q, None, options.cu_seqlens_q)
        reasons = [hopper.refusal(x) or hopper.refusal_of_address(x.cache) for x in both]
        refused = any(x is not None for x in (*reasons, hopper.refusal_of_queries(queries)))
        return None if refused else NewRows(*both, queries)

    def append(
        self, q: Tensor, options: Options
    ) -> tuple[Tensor, Options, "hopper.Launched | None"]:
        """Writes the new rows after the used ones, quantized if the cache is and they are not.

        Returns the rotated q, the options of a call that sees the new rows, and all launches that
        this took, if it was launches alone.
        """
        both, queries = self._appended(options), self._queries(q, options)
        if self._go_to_kernels(both):
            from flash8.backends.hopper import append as hopper
            from flash8.ops import append as kernels

            if queries is not None and hopper.refusal_of_queries(queries) is not None:
                q, queries = portable.rotate(queries), None
            elif plan_cache.may_launch(q):
                launched = kernels.launch(*both, queries)
                if launched is not None:
                    q = q if launched.rotated is None else launched.rotated
                    return q, options._replace(seqused_k=launched.lengths), launched
            rotated, lengths = kernels.append(*both, queries)
            q = q if rotated is None else rotated
            return q, options._replace(seqused_k=lengths), None
        if queries is not None:
            q = portable.rotate(queries)
        longer = options._replace(seqused_k=portable.lengths(both[0]))
        call_by(_LENGTHENED_NAMES, ops.check_indices, q, self._k_cache, longer)
        torch.ops.flash8.append_kv(
            self._k_cache,
            self._v_cache,
            *(portable.prepare(appended) for appended in both),
            self._starts,
            self._cu_seqlens,
            options.page_table,
            options.kv_batch_idx,
        )
        return q, longer, None

    def _appended(self, options: Options) -> tuple[Appended, Appended]:
        where = (self._starts, self._cu_seqlens, options.page_table, options.kv_batch_idx)
        return (
            Appended(
                *(self._k_cache, self._k, *where, self._k_descale, options.k_mean, self._rope),
                norm=self._norms.get("k"),
            ),
            Appended(self._v_cache, self._v, *where, self._v_descale, options.v_mean),
        )

    def _queries(self, q: Tensor, options: Options) -> Queries | None:
        if self._rope is None and "q" not in self._norms:
            return None
        advances = options.causal or options.is_local
        return Queries(q, self._rope, options.cu_seqlens_q, advances, self._norms.get("q"))

    def _go_to_kernels(self, both: tuple[Appended, Appended]) -> bool:
        """Whether compiled kernels rotate, quantize and write the new rows."""
        if not backends.kernels_wanted(self._k_cache):
            return False
        from flash8.backends.hopper import append as hopper

        for appended in both:
            reason = hopper.refusal(appended)
            if reason is not None:
                if not torch.compiler.is_compiling():
                    backends.tell_about_refusal(reason)
                return False
        return True


def _check_rotary(q: Tensor, cos: Any, sin: Any) -> None:
    if cos is None or sin is None:
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise ValueError(f"rotary_cos and rotary_sin must be given together, got {missing}=None")
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        require_tensor(name, x, (q.dtype, torch.float32), q)
        require_rank(name, x, 2, "(seqlen_rotary, rotary_dim / 2)")
    require_shape("rotary_sin", sin, tuple(cos.shape), "rotary_cos's shape")
    rotary_dim = 2 * cos.shape[1]
    if rotary_dim % 16 != 0 or not 0 < rotary_dim <= q.shape[-1]:
        raise ValueError(
            "rotary_cos must have rotary_dim / 2 columns, rotary_dim a multiple of 16 up to "
            f"head_dim = {q.shape[-1]}, got shape {tuple(cos.shape)}"
        )
