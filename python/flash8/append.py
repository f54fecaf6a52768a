"""The keys and values that a KV-cache call appends: checks, rotary, quantization, the write."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash8 import backends, checks
from flash8.arguments import require_rank, require_shape, require_tensor
from flash8.float8 import E4M3
from flash8.options import Options
from flash8.rotary import Rope, apply_rotary, token_positions

if TYPE_CHECKING:
    from flash8.fp8.request import Appended


class NewKeys:
    """The keys and values that a call appends, checked."""

    def __init__(
        self,
        k: Any,
        v: Any,
        cu_seqlens: Any,
        k_cache: Tensor,
        v_cache: Tensor,
        geometry: checks.Geometry,
        options: Options,
    ) -> None:
        if k is None or v is None:
            missing = "k" if k is None else "v"
            raise ValueError(f"k and v must be given together, got {missing}=None")
        if options.seqused_k is None:
            raise ValueError("k and v need cache_seqlens: where to append, got None")
        checks.require_writable("k_cache", k_cache)
        checks.require_writable("v_cache", v_cache)
        self._k_cache, self._v_cache, self._cu_seqlens = k_cache, v_cache, cu_seqlens
        self._starts = options.seqused_k
        if cu_seqlens is not None:
            require_tensor("cu_seqlens_k_new", cu_seqlens, torch.int32, k_cache)
            require_shape("cu_seqlens_k_new", cu_seqlens, (geometry.batch + 1,), "(batch + 1,)")
        for name, new, head_dim in (("k", k, geometry.head_dim), ("v", v, geometry.head_dim_v)):
            self._check_new(name, new, head_dim, geometry)
        if v.shape[:-2] != k.shape[:-2]:
            raise ValueError(
                f"v must have as many new rows as k {tuple(k.shape)}, got {tuple(v.shape)}"
            )
        self._quantizes = k.dtype != E4M3 and k_cache.dtype == E4M3
        if k_cache.dtype == E4M3 and (v.dtype == E4M3) == self._quantizes:
            raise TypeError(f"v must have k's dtype {k.dtype}, got {v.dtype}")
        self._k, self._v = k, v
        self._rope: Rope | None = None

    def _check_new(self, name: str, new: Any, head_dim: int, geometry: checks.Geometry) -> None:
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

    def refuse_gradients(self, *tensors: Tensor | None) -> None:
        everything = (*tensors, self._k, self._v, self._k_cache, self._v_cache)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in everything):
            raise ValueError(
                "flash_attn_with_kvcache appends k and v in place and has no backward then; call "
                "it under torch.no_grad(), or pass tensors that do not require grad"
            )

    def refuse_rotated_cache(self, rotary_cos: Any) -> None:
        if self._quantizes or rotary_cos is not None:
            raise ValueError(
                "k_cache is rotated (hadamard), so new keys must come rotated and quantized: pass "
                f"k and v as {E4M3}, without rotary_cos and rotary_sin"
            )

    def rotate(
        self,
        q: Tensor,
        options: Options,
        cos: Any,
        sin: Any,
        rotary_seqlens: Any,
        interleaved: bool,
    ) -> Tensor:
        """Rotates the new keys and returns the rotated q."""
        offsets = self._starts
        if rotary_seqlens is not None:
            offsets = require_tensor("rotary_seqlens", rotary_seqlens, torch.int32, q)
            require_shape("rotary_seqlens", offsets, tuple(self._starts.shape), "(batch,)")
        _check_rotary(q, cos, sin)
        advance = options.causal or options.is_local
        q_positions = token_positions(q, offsets, options.cu_seqlens_q, advance=advance)
        k_positions = token_positions(self._k, offsets, self._cu_seqlens)
        for positions in (q_positions, k_positions):
            _check_positions(positions, cos)
        if self._quantizes:  # rotated with the cast: rounded once
            self._rope = Rope(cos, sin, offsets, interleaved)
        else:
            self._k = apply_rotary(self._k, cos, sin, k_positions, interleaved=interleaved)
        return apply_rotary(q, cos, sin, q_positions, interleaved=interleaved)

    def lengthen(self, options: Options) -> Options:
        """The options of a call that sees the new rows."""
        if self._cu_seqlens is None:
            lengths = self._starts + self._k.shape[1]
        else:
            lengths = self._starts + (self._cu_seqlens[1:] - self._cu_seqlens[:-1])
        return options._replace(seqused_k=lengths)

    def append(self, options: Options) -> None:
        """Writes the new rows behind the used ones, quantized if the cache is and they are not."""
        k, v = self._k, self._v
        if self._quantizes:
            from flash8.fp8 import kernels, portable_append

            both = self._appended(options)
            if self._go_to_kernels(both):
                for appended in both:
                    kernels.append(appended)
                return
            k, v = (portable_append.quantize(appended) for appended in both)
        torch.ops.flash8.append_kv(
            self._k_cache,
            self._v_cache,
            k,
            v,
            self._starts,
            self._cu_seqlens,
            options.page_table,
            options.kv_batch_idx,
        )

    def _appended(self, options: Options) -> "tuple[Appended, Appended]":
        from flash8.fp8.request import Appended

        where = (self._starts, self._cu_seqlens, options.page_table, options.kv_batch_idx)
        return (
            Appended(self._k_cache, self._k, *where, options.k_descale, options.k_mean, self._rope),
            Appended(self._v_cache, self._v, *where, options.v_descale, options.v_mean),
        )

    def _go_to_kernels(self, both: "tuple[Appended, Appended]") -> bool:
        """Whether compiled kernels rotate, quantize and write the new rows."""
        if not backends.kernels_wanted(self._k_cache):
            return False
        from flash8.fp8 import appender

        for appended in both:
            reason = appender.refusal(appended)
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


def _check_positions(positions: Tensor, cos: Tensor) -> None:
    """That every position has a row in cos. Reads data, so on CPU tensors only."""
    if positions.device.type != "cpu" or torch.compiler.is_compiling() or positions.numel() == 0:
        return
    first, last = positions.min().item(), positions.max().item()
    if first < 0 or last >= cos.shape[0]:
        raise ValueError(
            f"rotary_cos must have a row for every position from {first} to {last}, "
            f"got {cos.shape[0]} rows"
        )
