"""What an FP8 call adds to the description of a forward call: descales, means, the type of O."""

import torch
from torch import Tensor

from flash8 import _native
from flash8.backends.hopper import attention_params, heuristics
from flash8.backends.hopper.variants import Scales
from flash8.call.options import Options
from flash8.tensors.descales import is_per_token
from flash8.tensors.float8 import E4M3

_OUTPUTS = {
    torch.float16: _native.ElementType.FLOAT16,
    torch.bfloat16: _native.ElementType.BFLOAT16,
    E4M3: _native.ElementType.UINT8,
}
_DESCALES = ("q_descale", "k_descale", "v_descale")
_CHANNELS = ("k_mean", "v_mean", "v_channel_descale")


def refusal(v: Tensor, options: Options) -> str | None:
    """Why no FP8 kernel serves a call with these options, or None."""
    if any(is_per_token(x, v) for x in (options.k_descale, options.v_descale)):
        return "a descale per token has no forward kernel"
    if scales(options) == "block" and options.page_table is not None:
        return "page_table with descales by page or block has no forward kernel yet"
    if scales(options) == "block" and options.leftpad_k is not None:
        return "leftpad_k with descales per block has no kernel: blocks start with the sequence"
    if options.v_colmajor_tokens is not None and v.shape[-2] % 16 != 0:
        return f"head_dim_v is {v.shape[-2]}; a v_colmajor v needs a multiple of 16"
    if options.v_colmajor_tokens is not None and options.leftpad_k is not None:
        return "leftpad_k with a v_colmajor v has no kernel: its tiles start with the sequence"
    return None


def wants_v_colmajor(q: Tensor, v: Tensor, by_block: bool) -> bool:
    """Whether a call that quantizes v should have it with its keys innermost."""
    # The type for which the quantizer that writes it so ships.
    serves = v.dtype == torch.bfloat16 and v.shape[-1] % 16 == 0
    return serves and heuristics.reads_v_colmajor(by_block, q.shape[-1], v.shape[-1])


def refusal_widened(q: Tensor, k: Tensor, v: Tensor, options: Options) -> str | None:
    """Why no kernel serves e4m3 k and v under a q of 16 bits, which are widened, or None."""
    for name, x in (("head_dim", k), ("head_dim_v", v)):
        if x.shape[-1] % attention_params.ROW_BYTES != 0:
            return f"{name} is {x.shape[-1]}; e4m3 k and v are read by 16 bytes"
    for name in ("k_descale", "v_descale"):
        descale = getattr(options, name)
        if descale is not None and descale.dim() == 3:
            return (
                f"{name} is per token, block or page; the forward kernel takes one per tensor or "
                f"head of an e4m3 cache under {q.dtype} q"
            )
    for name in ("k_mean", "v_mean", "v_channel_descale"):
        if getattr(options, name) is not None:
            return f"{name} has no forward kernel with {q.dtype} q"
    if options.v_colmajor_tokens is not None:
        return f"a v_colmajor v has no kernel with {q.dtype} q"
    if options.dropout_p > 0.0:
        return f"dropout_p has no kernel with {q.dtype} q and {k.dtype} k"
    return None


def describe_widened(call: _native.ForwardParams, options: Options) -> list[Tensor]:
    """Fills in the descales of k and v under a q of 16 bits. Returns what `call` points to then."""
    return attention_params.describe_scaling(call, options, ("k_descale", "v_descale"), ())


def scales(options: Options) -> Scales:
    """The granularity that the kernel has to be made for."""
    given = (getattr(options, name) for name in _DESCALES)
    return "block" if any(x is not None and x.dim() == 3 for x in given) else "head"


def describe(
    call: _native.ForwardParams, q: Tensor, k: Tensor, out: Tensor, options: Options
) -> list[Tensor]:
    """Fills in the FP8 fields of `call`. Returns the tensors that it now points to.

    Raises:
        TypeError: `out` has a dtype that the kernel does not write.
    """
    if out.dtype not in _OUTPUTS:
        raise TypeError(f"out has dtype {out.dtype}; FP8 kernels write {list(_OUTPUTS)}")
    call.o_type = _OUTPUTS[out.dtype]
    return describe_scales(call, q, k, options)


def describe_scales(
    call: attention_params.TrainingCall, q: Tensor, k: Tensor, options: Options
) -> list[Tensor]:
    """Fills in descales and means, which a backward has too. Returns what `call` points to then."""
    _describe_query_heads(call, q, k, options)
    return attention_params.describe_scaling(call, options, _DESCALES, _CHANNELS)


def describe_query_scales(
    call: _native.DecodeParams, q: Tensor, k: Tensor, options: Options
) -> list[Tensor]:
    """Fills in the descales of Q alone. Returns what `call` points to then."""
    _describe_query_heads(call, q, k, options)
    return attention_params.describe_scaling(call, options, ("q_descale",), ())


def _describe_query_heads(
    call: attention_params.Call, q: Tensor, k: Tensor, options: Options
) -> None:
    heads, heads_kv = q.shape[-2], k.shape[-2]
    descale = options.q_descale
    of_kv_heads = descale is not None and descale.dim() > 1 and descale.shape[1] == heads_kv
    call.heads_per_q_descale = heads // heads_kv if of_kv_heads else 1
