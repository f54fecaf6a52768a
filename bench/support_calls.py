"""The calls of the support table (support_table.py): small, of ones, made when they are called."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flash8
from flash8 import fp8

E4M3 = torch.float8_e4m3fn
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
Call = Callable[[], Any]


def tensors(dtype: torch.dtype = torch.bfloat16, dim: int = 64, rows: int = 32) -> list[Tensor]:
    """q, k and v of one sequence, four query heads over two KV heads."""
    shapes = ((1, rows, heads, dim) for heads in (4, 2, 2))
    return [torch.ones(shape).to(dtype) for shape in shapes]


def dense(dtype: torch.dtype = torch.bfloat16, dim: int = 64, **options: Any) -> Call:
    return lambda: flash8.flash_attn_func(*tensors(dtype, dim), **options)


def packed(leaf: bool = False, **options: Any) -> Call:
    def call() -> Any:
        q, k, v = (x[0].requires_grad_(leaf) for x in tensors())
        offsets = torch.tensor([0, 20, 32], dtype=torch.int32)
        sizes = (offsets, offsets, 20, 20)
        return flash8.flash_attn_varlen_func(q, k, v, *sizes, **options)

    return call


def cached(
    dtype: torch.dtype, q_dtype: torch.dtype | None = None, dim: int = 64, **options: Any
) -> Call:
    """Four queries over a cache of `dtype`."""

    def call() -> Any:
        q, k, v = tensors(dtype, dim)
        given = {"cache_seqlens": ints([16]), "num_splits": 1, **options}
        with torch.no_grad():
            return flash8.flash_attn_with_kvcache(q[:, :4].to(q_dtype or dtype), k, v, **given)

    return call


def latent(dtype: torch.dtype, **options: Any) -> Call:
    """Two queries of absorbed MLA over one cache of `dtype`."""

    def call() -> Any:
        q, qv, both = (
            torch.ones(1, n, h, d) for n, h, d in ((2, 16, 64), (2, 16, 512), (32, 1, 576))
        )
        cache = both.to(dtype)
        given = {"cache_seqlens": ints([16]), "num_splits": 1, **options}
        with torch.no_grad():
            return flash8.flash_attn_with_kvcache(
                q.to(BF16), cache[..., 512:], cache[..., :512], qv=qv.to(BF16), **given
            )

    return call


def prefilled(
    dtype: torch.dtype, page_size: int = 32, q_dtype: torch.dtype | None = None, **options: Any
) -> Call:
    """32 queries of two heads for each KV head, over a cache of `dtype`."""

    def call() -> Any:
        q, k, v = tensors(dtype)
        q = q.to(q_dtype or dtype)
        k, v = (x.reshape(-1, page_size, *x.shape[2:]) for x in (k, v))
        with torch.no_grad():
            return flash8.flash_attn_with_kvcache(
                q, k, v, cache_seqlens=ints([32]), num_splits=1, **options
            )

    return call


def quantized(granularity: str, of_v: str | None = None, **steps: Any) -> Call:
    """Attention on tensors that fp8.quantize made."""

    def call() -> Any:
        q, k, v = tensors()
        rotation, smooth = steps.get("hadamard"), steps.get("smooth", False)
        q8 = fp8.quantize(q, granularity, hadamard=rotation)
        k8 = fp8.quantize(k, granularity, smooth_k=smooth, hadamard=rotation)
        colmajor = steps.get("v_colmajor", False)
        v8 = fp8.quantize(v, of_v or granularity, smooth_v=smooth, v_colmajor=colmajor)
        return flash8.flash_attn_func(q8, k8, v8)

    return call


def multiplied(
    shape_a: tuple[int, ...], shape_b: tuple[int, ...], bias: bool = False, **options: Any
) -> Call:
    """A product of 32 by 48 elements with scales of these shapes."""

    def call() -> Any:
        a, b = (torch.ones(n, 144).to(E4M3) for n in (32, 48))
        scales = (torch.ones(shape) for shape in (shape_a, shape_b))
        given = torch.ones(48) if bias else None
        return flash8.gemm.scaled_mm(a, b.t(), *scales, bias=given, **options)

    return call


def operand(granularity: str) -> Call:
    """An operand of a product, from a matrix."""
    return lambda: flash8.gemm.quantize(torch.ones(32, 144), granularity)


def operand_of_norm(granularity: str, **options: Any) -> Call:
    x, weight = torch.ones(32, 144), torch.ones(144)
    return lambda: flash8.gemm.quantize_rms_norm(x, weight, granularity=granularity, **options)


def operand_of_attention(
    dtype: torch.dtype = torch.bfloat16, dim: int = 128, **options: Any
) -> Call:
    return lambda: flash8.gemm.quantize_attention(*tensors(dtype, dim), **options)


def operand_of_silu(granularity: str) -> Call:
    x = torch.ones(32, 144)
    return lambda: flash8.gemm.quantize_silu_mul(x, x, granularity=granularity)


def multiplied_in_groups(
    shape_a: tuple[int, ...], shape_b: tuple[int, ...], apart: bool = False, **options: Any
) -> Call:
    """Products of two groups of 16 rows with scales of these shapes."""

    def call() -> Any:
        a, b = torch.ones(32, 144).to(E4M3), torch.ones(2, 48, 144).to(E4M3)
        scales = (torch.ones(shape) for shape in (shape_a, shape_b))
        if apart:
            options["masked_m"] = ints([16, 3])
            return flash8.gemm.grouped_scaled_mm(a.view(2, 16, 144), b.mT, *scales, **options)
        return flash8.gemm.grouped_scaled_mm(a, b.mT, *scales, ints([16, 32]), **options)

    return call


def multiplied_along_k(shape_a: tuple[int, ...], shape_b: tuple[int, ...], **options: Any) -> Call:
    """Products of two groups along K, of 32 rows and 48 columns, with scales of these shapes."""

    def call() -> Any:
        a, b = torch.ones(32, 144).to(E4M3), torch.ones(48, 144).to(E4M3)
        scales = (torch.ones(shape) for shape in (shape_a, shape_b))
        return flash8.gemm.grouped_scaled_mm(a, b.t(), *scales, ints([40, 144]), **options)

    return call


def projected(head_dim: int = 128, rotary_dim: int = 128, **options: Any) -> Call:
    """q, k and v of two sequences of 16 tokens, or of packed ones."""

    def call() -> Any:
        a, b = torch.ones(2, 16, 144).to(E4M3), torch.ones(4 * head_dim, 144).to(E4M3)
        if "cu_seqlens" in options:
            a = a.flatten(0, 1)
        table = torch.ones(16, rotary_dim // 2)
        scales = torch.ones(32, 1), torch.ones(1, 4 * head_dim)
        given = {"rotary_cos": table, "rotary_sin": table, **options}
        return flash8.gemm.qkv_projection(a, b.t(), *scales, heads_q=2, heads_kv=1, **given)

    return call


def quantize(granularity: str, dim: int = 64, **options: Any) -> Call:
    return lambda: fp8.quantize(tensors(dim=dim)[1], granularity, **options)


def appended(dtype: torch.dtype, **options: Any) -> Call:
    """A call that appends four rows to a cache of `dtype`."""

    def call() -> Any:
        q, k_cache, v_cache = tensors(dtype)
        _, k, v = tensors(BF16 if dtype == E4M3 else dtype, rows=4)
        lengths = {"cache_seqlens": ints([16]), "num_splits": 1}
        with torch.no_grad():
            return flash8.flash_attn_with_kvcache(
                q[:, :4].to(k.dtype), k_cache, v_cache, k, v, **lengths, **options
            )

    return call


def trained(dtype: torch.dtype = BF16, dim: int = 64, **options: Any) -> Call:
    """A call with gradients."""
    return lambda: flash8.flash_attn_func(
        *(x.requires_grad_() for x in tensors(dtype, dim)), causal=True, **options
    )


def trained_fp8(recipe: Any) -> Call:
    return lambda: flash8.fp8_attention(
        *(x.requires_grad_() for x in tensors()), recipe, causal=True
    )


def norms() -> dict[str, Tensor]:
    return {f"{x}_norm_weight": torch.ones(64) for x in "qk"}


def ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def tables() -> tuple[Tensor, Tensor]:
    return torch.ones(32, 16), torch.zeros(32, 16)


def rotary() -> dict[str, Any]:
    return dict(zip(("rotary_cos", "rotary_sin"), tables(), strict=True))


def per_head() -> dict[str, Any]:
    return {"k_descale": torch.ones(1, 2), "v_descale": torch.ones(1, 2)}
