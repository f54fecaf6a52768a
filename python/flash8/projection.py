"""`flash8.gemm.qkv_projection`: from an e4m3 activation to q, k and v of the FP8 forward."""

import torch
from torch import Tensor

from flash8.backends import cpu
from flash8.call import qkv_projection as call
from flash8.ops import qkv_projection as ops
from flash8.tensors import memory
from flash8.tensors.scaled_tensor import ScaledTensor


def qkv_projection(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    heads_q: int,
    heads_kv: int,
    bias: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    rotary_interleaved: bool = True,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    cu_seqlens: Tensor | None = None,
    seqused: Tensor | None = None,
) -> tuple[ScaledTensor, ScaledTensor, ScaledTensor]:
    """q, k and v of scale_a * scale_b * (a @ b) + bias, as the attention functions take them.

    Heads of q, then of k, then of v lie side by side in the columns of b. Those of q and k are
    normalised, then rotated, and all are quantized by 128 tokens of a head: the result is that of
    `scaled_mm` in fp32, RMSNorm and `flash8.fp8.quantize(..., "block")`, bit by bit, v with
    `v_colmajor=True`. For a head_dim of 128 this is one kernel; others take one for each part.

    Args:
        a: e4m3 (batch, seqlen, K), or (total, K) with cu_seqlens; K contiguous, a multiple of 16.
        b: e4m3 (K, (heads_q + 2 heads_kv) * head_dim), column-major, as `weight.t()`.
        scale_a, scale_b: fp32, as in `scaled_mm`, where M counts the tokens of all sequences. Of a
            dense a, scale_a may also be (batch, seqlen, 1 or ceil(K / 128)).
        heads_q, heads_kv: how many heads q, and k and v, have; heads_q is a multiple of heads_kv.
        bias: (N,), bf16, fp16 or fp32.
        rotary_cos, rotary_sin: (seqlen_rotary, rotary_dim / 2), rotary_dim a multiple of 16; bf16,
            fp16 or fp32. q and k are rotated at rotary_seqlens + 0, 1, ... of their sequence. On a
            CUDA device positions outside of the tables are the nearest row's.
        rotary_seqlens: int32 or int64 (batch,): the position of each sequence's first token,
            default 0.
        rotary_interleaved: pairs (0, 1), (2, 3), ... rather than (0, rotary_dim / 2), ...
        q_norm_weight, k_norm_weight: (head_dim,), bf16, fp16 or fp32:
            x / sqrt(mean(x^2) + norm_eps) * weight of each head of q or k, before the rotation.
        norm_eps: from 0 on.
        cu_seqlens: int32 or int64 (batch + 1,), the sequences of a packed a.
        seqused: int32 or int64 (batch,): only so many tokens of each sequence count for descales;
            v has zeros for the others.

    Returns:
        q, k: of shapes (batch, seqlen, heads, head_dim) or (total, heads, head_dim).
        v: v_colmajor, (batch, heads_kv, head_dim, 128 * blocks) or packed without batch.
        All e4m3, of granularity "block", without a derivative.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: A shape, stride or device is not supported, or on CPU tensors what cu_seqlens,
            seqused or rotary_seqlens holds.
        RuntimeError: An input requires grad, or a CUDA graph is captured before the kernel's check.
    """
    projection = call.check(
        *(a, b, scale_a, scale_b, bias),
        (heads_q, heads_kv),
        (rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved),
        (q_norm_weight, k_norm_weight, norm_eps),
        *(cu_seqlens, seqused),
    )
    indices = (projection.cu_seqlens, projection.seqused)
    if all(memory.is_readable(x) for x in (a, *indices) if x is not None):
        cpu.check_tokens(a, *indices)
    if a.device.type == "cpu" and not torch.compiler.is_compiling():
        call.check_positions(projection)
    q, q_descale, k, k_descale, v, v_descale = ops.qkv_projection(projection)
    of_sequences = (None, None, projection.cu_seqlens)  # without a mean or a rotation
    tokens = a.shape[-2]
    return (
        ScaledTensor(q, q_descale, "block", *of_sequences),
        ScaledTensor(k, k_descale, "block", *of_sequences),
        ScaledTensor(v, v_descale, "block", *of_sequences, v_colmajor_tokens=tokens),
    )
