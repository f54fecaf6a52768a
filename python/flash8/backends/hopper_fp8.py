"""What an FP8 call adds to the description of a forward call: descales, means, the type of O."""

import torch
from torch import Tensor

from flash8 import _native
from flash8.descales import BLOCK, block_offsets
from flash8.options import Options
from flash8.variants import Scales

_OUTPUTS = {
    torch.float16: _native.ElementType.FLOAT16,
    torch.bfloat16: _native.ElementType.BFLOAT16,
}
_DESCALES = ("q_descale", "k_descale", "v_descale")


def refusal(options: Options) -> str | None:
    """Why no FP8 kernel serves a call with these options, or None."""
    if options.alibi_slopes is not None:
        return "alibi_slopes has no FP8 kernel yet"
    if scales(options) == "block" and options.leftpad_k is not None:
        return "leftpad_k with descales per block has no kernel: blocks start with the sequence"
    return None


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
    held = []
    heads, heads_kv = q.shape[-2], k.shape[-2]
    call.heads_per_q_descale = 1
    for name in _DESCALES:
        descale = getattr(options, name)
        if descale is None:
            continue
        held.append(descale)
        # The stride of a dimension of one is never stepped over.
        steps = [0 if n == 1 else s for n, s in zip(descale.shape, descale.stride(), strict=True)]
        setattr(call, name, (descale.data_ptr(), *steps, *[0] * (3 - len(steps))))
        if name == "q_descale" and descale.dim() > 1 and descale.shape[1] == heads_kv:
            call.heads_per_q_descale = heads // heads_kv
    if options.v_mean is not None:
        mean = options.v_mean.contiguous()
        held.append(mean)
        call.v_mean = (mean.data_ptr(), *_mean_strides(mean))
    if options.k_mean is not None:
        shift = _score_shift(q, options.k_mean, options)
        held.append(shift)
        call.score_shift = (
            shift.data_ptr(),
            0 if shift.dim() == 2 else shift.stride(0),
            shift.stride(-2),
        )
    return held


def _mean_strides(mean: Tensor) -> tuple[int, int]:
    return (mean.stride(0) if mean.dim() == 3 else 0), mean.stride(-2)


def _score_shift(q: Tensor, k_mean: Tensor, options: Options) -> Tensor:
    """softmax_scale * q . k_mean: (batch, heads, seqlen_q), or (heads, total_q) when packed."""
    packed = q.dim() == 3
    heads_kv = k_mean.shape[-2]
    scale = q.shape[-1] ** -0.5 if options.softmax_scale is None else options.softmax_scale
    grouped = q.float().unflatten(-2, (heads_kv, -1))  # (..., rows, heads_kv, G, d)
    sequence = _sequence_of_rows(q, options) if packed else None
    mean = (
        k_mean if k_mean.dim() == 2 else k_mean[:, None] if sequence is None else k_mean[sequence]
    )
    shift = (grouped * mean[..., None, :]).sum(dim=-1).flatten(-2) * scale  # (..., rows, heads)
    if options.q_descale is not None:
        shift = shift * _q_factor(options.q_descale, q, sequence, options)
    result: Tensor = shift.transpose(-1, -2).contiguous()
    return result


def _sequence_of_rows(q: Tensor, options: Options) -> Tensor:
    """The sequence of every packed row; rows behind the last one count as its own."""
    assert options.cu_seqlens_q is not None
    rows = torch.arange(q.shape[0], device=q.device)
    ends = options.cu_seqlens_q[1:].contiguous()
    sequence: Tensor = torch.searchsorted(ends, rows, right=True)
    return sequence.clamp_(max=ends.shape[0] - 1)


def _q_factor(descale: Tensor, q: Tensor, sequence: Tensor | None, options: Options) -> Tensor:
    """Q's descale, broadcasting over (..., rows, heads)."""
    heads = q.shape[-2]
    if descale.dim() == 0:
        return descale
    if descale.dim() == 2:
        full = descale.repeat_interleave(heads // descale.shape[1], dim=1)  # (batch, heads)
        return full[:, None] if sequence is None else full[sequence]
    rows = torch.arange(q.shape[-3], device=q.device)
    if sequence is None:
        return descale[:, :, rows // BLOCK].transpose(1, 2)
    assert options.cu_seqlens_q is not None
    start = options.cu_seqlens_q[:-1].long()[sequence]
    block = block_offsets(options.cu_seqlens_q)[sequence] + (rows - start) // BLOCK
    return descale[0][:, block.clamp_(max=descale.shape[2] - 1)].transpose(0, 1)
