"""`fp8_attention`: FP8 attention for training. Quantizes inside, differentiable.

Q8, K8, V8 = quantize(q M, k M, v)    by the recipe, without gradient; M only if it rotates
O, LSE     = attention(Q8, K8, V8)    one op; its gradients pass straight through to q M, k M, v
dq, dk     = d(q M) M^T, d(k M) M^T   the quantizer rotates, so only gradients are rotated there
"""

from typing import Any

import torch
from torch import Tensor

from flash8 import backends
from flash8.backends import cpu
from flash8.call import checks
from flash8.call.autocast import cast_for_autocast
from flash8.call.observed import is_autocast_on, is_transformed, may_carry_tangents
from flash8.call.options import Options
from flash8.fp8.recipes import FP8_PRODUCTS, CurrentScaling, Recipe, check_call
from flash8.ops import fp8_attention as ops
from flash8.tensors import memory
from flash8.tensors.arguments import call_by, require_bool
from flash8.tensors.hadamard import rotation_for
from flash8.tensors.philox import draw_seed
from flash8.tensors.scaled_tensor import ScaledTensor

_DEFAULT = CurrentScaling()


def fp8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recipe: Recipe | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention whose forward is FP8. Differentiable in q, k, v, s_aux and through LSE.

    Args:
        q: (batch, seqlen_q, heads, head_dim) or (total_q, heads, head_dim) with cu_seqlens_q and
            max_seqlen_q; bf16 or fp16, on CPU tensors fp32 and fp64 too.
        k, v: likewise with heads_kv heads, and cu_seqlens_k, max_seqlen_k.
        recipe: `CurrentScaling` (the default), `BlockScaling` or `DelayedScaling`: how the scales
            are found, and how much of the backward is FP8.
        The others are those of `flash8.flash_attn_func`.

    Returns:
        O in q's layout and dtype; with return_attn_probs (O, LSE), LSE fp32.

    Gradients are those of the dequantized inputs, passed straight through the rounding. For the
    backward it keeps the FP8 inputs, O and LSE.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is supported.
    """
    chosen: Recipe = _DEFAULT if recipe is None else recipe
    require_bool("return_attn_probs", return_attn_probs)
    _refuse_quantized(q=q, k=k, v=v)
    if is_autocast_on():
        q, k, v = cast_for_autocast(q, k, v)
    left, right = checks.window(window_size)
    options = Options(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_left=left,
        window_right=right,
        attention_chunk=attention_chunk,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        deterministic=deterministic,
    )
    _, options = checks.attention(q, k, v, None, s_aux, None, options)
    check_call(chosen, options)
    if chosen.gradient_amax() is not None and is_transformed():
        raise RuntimeError(
            "recipe DelayedScaling gathers amax in place, which torch.func's transforms do not "
            "allow: use CurrentScaling or BlockScaling there, or .eval() it"
        )
    _check_boundaries("cu_seqlens_q", q, options.cu_seqlens_q)
    _check_boundaries("cu_seqlens_k", k, options.cu_seqlens_k)
    if options.dropout_p > 0.0:
        seed = (
            draw_seed(q.device)
            if dropout_seed is None
            else checks.dropout_seed_tensor(dropout_seed, q.device)
        )
        options = options._replace(dropout_seed=seed)
    rotation = rotation_for(chosen.hadamard, q.shape[-1])
    q8 = chosen.quantize("q", q.detach(), options.cu_seqlens_q)
    k8 = chosen.quantize("k", k.detach(), options.cu_seqlens_k)
    by_block = k8.granularity == "block"
    colmajor = not _is_differentiated(q, k, v, s_aux) and backends.wants_v_colmajor(q, v, by_block)
    v8 = chosen.quantize(
        "v", v.detach(), options.cu_seqlens_k, **({"v_colmajor": True} if colmajor else {})
    )
    out, lse = ops.forward(
        q,
        k,
        v,
        s_aux,
        q8.data,
        k8.data,
        v8.data,
        None if rotation is None else rotation.seed,
        FP8_PRODUCTS[chosen.backward],
        chosen.gradient_dtype,
        chosen.gradient_descale(),
        chosen.gradient_amax(),
        *_with_scales(options, q8, k8, v8),
    )
    return (out, lse) if return_attn_probs else out


def _is_differentiated(*inputs: Tensor | None) -> bool:
    """Whether a derivative may be asked for, which reads V by token."""
    tangents = is_transformed() if torch.compiler.is_compiling() else may_carry_tangents()
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    return tangents or wanted


def _check_boundaries(name: str, x: Tensor, cu_seqlens: Tensor | None) -> None:
    """Before a recipe takes note of x, and under the caller's name."""
    if cu_seqlens is not None and memory.is_readable(x) and memory.is_readable(cu_seqlens):
        call_by({"cu_seqlens": name}, cpu.check_tokens, x, cu_seqlens, None)


def _with_scales(options: Options, q8: ScaledTensor, k8: ScaledTensor, v8: ScaledTensor) -> Options:
    return options._replace(
        q_descale=q8.descale,
        k_descale=k8.descale,
        v_descale=v8.descale,
        k_mean=k8.mean,
        v_mean=v8.mean,
        v_colmajor_tokens=v8.v_colmajor_tokens,
    )


def _refuse_quantized(**tensors: Any) -> None:
    for name, x in tensors.items():
        if isinstance(x, ScaledTensor) or getattr(x, "dtype", None) == checks.FP8:
            raise TypeError(
                f"{name} must be a 16-bit tensor (fp32 or fp64 on CPU): fp8_attention quantizes "
                "inside; attention of quantized tensors is flash_attn_func's and "
                "flash_attn_varlen_func's"
            )
