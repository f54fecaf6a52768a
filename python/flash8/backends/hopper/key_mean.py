"""The mean of the keys of each sequence and KV head, on the device, for smooth_k of a backward.

The quantizer's kernels make it: K is read once, in one order, and nothing on the host.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from flash8.backends.hopper import quantize
from flash8.backends.hopper.quantize_variants import Job
from flash8.backends.hopper.verify import trust
from flash8.call.options import Options
from flash8.call.request import Request

_JOBS: tuple[Job, ...] = ("mean", "mean_finish")
_CHANNELS = 16  # that a thread of the quantizer has


def key_mean(k: Tensor, options: Options) -> Tensor:
    """fp32 (batch, heads_kv, head_dim): of the finite values of the used keys, 0 of none."""
    head_dim = k.shape[-1]
    if head_dim % _CHANNELS != 0:
        k = pad(k, (0, -head_dim % _CHANNELS))
    request = Request(
        k, "head", smooth=True, cu_seqlens=options.cu_seqlens_k, seqused=options.seqused_k
    )
    if quantize.refusal(request) is not None or not _are_trusted(k):
        return request.tokens.finite_mean(k.float())[..., :head_dim]
    return _by_kernels(request)[..., :head_dim]


def _are_trusted(k: Tensor) -> bool:
    return all(trust.is_trusted(quantize.variant_for(job, k), k.device) for job in _JOBS)


def _by_kernels(request: Request) -> Tensor:
    x = request.x
    launcher = quantize.Launcher(x, None, cu_seqlens=request.cu_seqlens, seqused=request.seqused)
    mean = quantize.allocate(request.mean_shape(), torch.float32, x)
    partial = quantize.allocate(quantize.partial_mean_shape(request), torch.float32, x)
    launcher.params.mean_partial = launcher.keep(partial).data_ptr()
    launcher.set_mean(mean)
    for job in _JOBS:
        launcher.launch(quantize.variant_for(job, x))
    return mean
