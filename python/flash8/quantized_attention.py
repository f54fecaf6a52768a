"""Attention that makes an operand of the output projection: O as e4m3."""

from torch import Tensor

from flash8.call import checks, e4m3_output
from flash8.call.autocast import cast_for_autocast
from flash8.call.options import Arguments, Options
from flash8.call.unwrap import unwrap
from flash8.ops import forward_e4m3 as ops
from flash8.tensors.scaled_tensor import Input


def quantize_attention(
    q: Input,
    k: Input,
    v: Input,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    k_mean: Tensor | None = None,
    v_mean: Tensor | None = None,
    v_channel_descale: Tensor | None = None,
    out_scale: Tensor | None = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """`quantize(O, "1x128")` of attention's output O in fp32: for inference.

    The kernel that finds O writes it as e4m3, with a scale for each 128 channels of a row, so that
    nothing else runs before the output projection:

        o8, scale_o = gemm.quantize_attention(q8, k8, v8, causal=True)
        y = gemm.scaled_mm(o8, w8.t(), scale_o, scale_w.t())  # w8, scale_w by "128x128"

    O is not rounded to 16 bits before it is quantized. Sequences are not split: for a few queries
    over a long cache `flash_attn_with_kvcache` and `quantize` may take less time.

    Args:
        q, k, v, and all but out_scale: as in `flash8.flash_attn_func` for tensors of 4 dimensions,
            and as in `flash8.flash_attn_varlen_func` for packed sequences and pages. head_dim_v is
            a multiple of 128.
        out_scale: fp32, one element, from 2^-126 to 2^126: the scale of all of O, found before.
            On CUDA tensors, whose values are not looked at, another value makes O NaN.

    Returns:
        data: e4m3 (tokens, heads * head_dim_v), where the sequences of a batch follow each other.
            Saturated: infinity is 448. NaN stays.
        scale: fp32 (tokens, heads * head_dim_v / 128), amax / 448 of what is finite: as of
            `quantize`. A query that sees no key has zeros and 1. With out_scale that, (1, 1).
        Both without a derivative.

    Raises:
        TypeError, ValueError: naming the argument, its value and what is supported.
        RuntimeError: An input requires grad, or a CUDA graph is captured before the kernel's check.
    """
    q, k, v = cast_for_autocast(q, k, v)
    arguments: Arguments = {
        "q": q,
        "k": k,
        "v": v,
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
        "softmax_scale": softmax_scale,
        "causal": causal,
        "attention_chunk": attention_chunk,
        "softcap": softcap,
        "pack_gqa": pack_gqa,
        "sm_margin": sm_margin,
    }
    arguments.update(unwrap(arguments))
    tensors = arguments["q"], arguments["k"], arguments["v"]
    window_left, window_right = checks.window(window_size)
    options = Options.of(arguments)._replace(window_left=window_left, window_right=window_right)
    geometry, options = checks.attention(*tensors, None, s_aux, None, options)
    e4m3_output.check(tensors[0], geometry, out_scale)
    data, scale = ops.forward_e4m3(*tensors, s_aux, out_scale, options)
    return data, scale if out_scale is None else out_scale.view(1, 1)
