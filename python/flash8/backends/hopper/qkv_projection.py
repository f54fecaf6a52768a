"""The QKV projection on a compiled kernel."""

import torch
from torch import Tensor

from flash8 import _native
from flash8.backends.hopper import kernels, quantize, streams
from flash8.backends.hopper.gemm import operands_of
from flash8.backends.hopper.qkv_variants import HEAD_DIM, QkvVariant
from flash8.backends.hopper.quantize import floats, group_ref
from flash8.call.qkv_projection import Projection
from flash8.tensors.float8 import E4M3


def refusal(projection: Projection) -> str | None:
    """Why no kernel serves the projection, or None."""
    m, n, k = projection.product.sizes
    if 0 in (m, n, k, projection.batch):
        return f"there is no token or no sum: M, N and K are {m}, {n} and {k}"
    if projection.head_dim != HEAD_DIM:
        return f"head_dim is {projection.head_dim}; the QKV projection has a kernel for {HEAD_DIM}"
    rope = projection.rope
    if rope is not None and not rope.interleaved and 2 * rope.cos.shape[1] != HEAD_DIM:
        return (
            f"rotary_dim is {2 * rope.cos.shape[1]}; the kernel of the QKV projection turns all "
            f"{HEAD_DIM} channels where pairs lie apart"
        )
    return None


def choose(projection: Projection) -> QkvVariant:
    """The kernel of a projection that is not refused."""
    return QkvVariant("block" if projection.product.has_blocks else "outer")


def qkv_projection(projection: Projection) -> tuple[Tensor, ...]:
    """q, its descale, k, its descale, v and its descale, on a's stream."""
    return launch(choose(projection), projection)


def launch(variant: QkvVariant, projection: Projection) -> tuple[Tensor, ...]:
    """The same, by this kernel."""
    call, held = _parameters(projection)
    a = projection.a
    data = [quantize.allocate(shape, E4M3, a) for shape in projection.data_shapes()]
    descales = [quantize.allocate(shape, torch.float32, a) for shape in projection.descale_shapes()]
    packed = projection.cu_seqlens is not None
    q, k, v = data
    call.q, call.k = _rows(q), _rows(k)
    call.v = (v.data_ptr(), 0 if packed else v.stride(0), v.stride(-2), v.stride(-3))
    refs = [group_ref(descale, packed) for descale in descales]
    call.q_descale, call.k_descale, call.v_descale = refs
    device, stream = a.device.index or 0, streams.current_stream(a)
    _native.launch_qkv(kernels.kernel(variant), device, stream, call)
    del held  # enqueued: the stream does the rest
    return tuple(x for pair in zip(data, descales, strict=True) for x in pair)


def _rows(x: Tensor) -> tuple[int, int, int, int]:
    """Contiguous, with tokens counted over all sequences."""
    heads, width = x.shape[-2:]
    return x.data_ptr(), 0, heads * width, width


def _parameters(projection: Projection) -> tuple[_native.QkvParams, list[Tensor | None]]:
    """All but the outputs, and the tensors that they point to."""
    p = projection
    call = _native.QkvParams()
    held = list(operands_of(p.product, call.gemm))
    call.heads_q, call.heads_kv, call.batch = p.heads_q, p.heads_kv, p.batch
    if p.cu_seqlens is None:
        call.seqlen = p.a.shape[1]

    def keep(x: Tensor) -> int:
        held.append(x)
        return x.data_ptr()

    for name, index in (("cu_seqlens", p.cu_seqlens), ("seqused", p.seqused)):
        if index is not None:
            setattr(call, name, keep(index.contiguous()))
    for name, norm in (("q_norm", p.q_norm), ("k_norm", p.k_norm)):
        if norm is not None:
            setattr(call, name, keep(floats(norm.weight)))
            call.norm_eps = norm.eps
    if p.rope is not None:
        call.rope_cos, call.rope_sin = keep(floats(p.rope.cos)), keep(floats(p.rope.sin))
        call.rope_rows, call.rotary_dim = p.rope.cos.shape[0], 2 * p.rope.cos.shape[1]
        call.interleaved = int(p.rope.interleaved)
        if p.rope.offsets is not None:
            call.rope_offsets = keep(p.rope.offsets.contiguous())
    return call, held
