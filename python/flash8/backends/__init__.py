"""Which backend serves which call.

`protocol` says what a backend is. The CPU backend serves every op; the Hopper backend has the
forward, the backward and the quantizer, for the calls that it does not refuse. `describe` is for
`flash8 info`.
"""

import functools
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash8.backends import cpu
from flash8.backends.hopper import mode

if TYPE_CHECKING:
    from flash8.backends.protocol import Backend, Backward, Forward, ForwardE4m3
    from flash8.call.geometry import Geometry
    from flash8.call.options import Options


def backend_for(tensor: Tensor) -> "Backend":
    """The backend that serves calls on `tensor`'s device."""
    if tensor.is_cuda:
        _tell_about_portable_cuda(tensor.get_device())
    return cpu


def forward_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    options: "Options",
    out: Tensor | None = None,
) -> "Forward":
    """The backend that serves one forward call. `out` is what the caller gave to be written.

    Raises:
        RuntimeError: the kernel has not been checked yet, and a CUDA graph is being captured.
        KernelRequiredError: FLASH8_KERNELS=require, and no kernel serves the call.
    """
    if not kernels_wanted(q):
        return backend_for(q)
    from flash8.backends import index_checks
    from flash8.backends.hopper import decode
    from flash8.backends.hopper import forward as hopper
    from flash8.backends.hopper.verify import trust

    index_checks.check_attention(q, k, options)
    over_cache = decode.is_wanted(q, k, options)
    why_not = decode.refusal(q, k, v, qv, options, out) if over_cache else None
    decodes = over_cache and why_not is None
    if decodes and trust.is_trusted(decode.choose(q, k, v, options, qv, out), q.device):
        return decode
    reason = hopper.refusal(q, k, v, qv, options, out)
    if reason is None:
        return hopper if trust.is_trusted(hopper.choose(q, k, v, options), q.device) else cpu
    if not decodes:  # a decode kernel that is not trusted has been told about
        # What the forward kernel would not take in any case, it need not give a reason for.
        wide = max(q.shape[-1], v.shape[-1]) > hopper.HEAD_DIMS[-1]
        over_e4m3 = k.dtype != q.dtype and options.cu_seqlens_k is None
        many = over_cache and decode.rows_of_head(q, k, options) > decode.MOST_ROWS
        no_other = options.page_table is not None or over_e4m3 or wide or qv is not None or many
        tell_about_refusal(why_not if why_not is not None and no_other else reason)
    return cpu


def forward_e4m3_backend(q: Tensor, k: Tensor, v: Tensor, options: "Options") -> "ForwardE4m3":
    """The backend that serves one forward call whose output is e4m3.

    Raises: as `forward_backend`.
    """
    if not kernels_wanted(q):
        return backend_for(q)
    from flash8.backends import index_checks
    from flash8.backends.hopper import forward_e4m3 as hopper
    from flash8.backends.hopper.verify import trust

    index_checks.check_attention(q, k, options)
    reason = hopper.refusal(q, k, v, options)
    if reason is not None:
        tell_about_refusal(reason)
    elif trust.is_trusted(hopper.choose(q, k, v, options), q.device):
        return hopper
    return cpu


def backward_backend(
    q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None, options: "Options"
) -> "Backward":
    """The backend that serves one backward call.

    Raises: as `forward_backend`.
    """
    if not kernels_wanted(q):
        return backend_for(q)
    from flash8.backends.hopper import backward as hopper
    from flash8.backends.hopper.verify import trust

    reason = hopper.refusal(q, k, v, qv, options)
    if reason is not None:
        tell_about_refusal(reason)
    elif trust.is_trusted(hopper.choose(q, k, v, options), q.device):
        return hopper
    return cpu


def has_fp8_backward(q8: Tensor, k8: Tensor, v8: Tensor, out: Tensor, options: "Options") -> bool:
    """Whether kernels serve the 16-bit backward of an FP8 forward as it is. Where not, it is that
    of dequantized tensors, which `backward_backend` finds a backend for.

    Raises: as `forward_backend`.
    """
    if not kernels_wanted(q8):
        return False
    from flash8.backends.hopper import backward_fp8 as hopper
    from flash8.backends.hopper.verify import trust

    if hopper.refusal(q8, k8, v8, out, options) is not None:
        return False
    return trust.is_trusted(hopper.choose(q8, v8, out, options), q8.device)


def wants_v_colmajor(q: Tensor, v: Tensor, by_block: bool) -> bool:
    """Whether a call that quantizes v for an FP8 forward should have its keys innermost."""
    if not kernels_wanted(v):
        return False
    from flash8.backends.hopper import forward_fp8 as hopper

    return hopper.wants_v_colmajor(q, v, by_block)


def kernels_wanted(tensor: Tensor) -> bool:
    """Whether calls on this tensor go to compiled kernels, as far as its device tells."""
    return tensor.is_cuda and mode.has_kernels(tensor.get_device())


@functools.cache
def _tell_about_portable_cuda(index: int) -> None:
    reason = mode.why_not(index) or "there is no compiled kernel for it (see `flash8 info`)"
    warnings.warn(
        "a call on CUDA tensors is served by the tiled PyTorch code of the CPU backend, which "
        f"reads index tensors on the host: {reason}",
        stacklevel=4,
    )


def tell_about_refusal(reason: str) -> None:
    """Called before the portable code serves a call that no kernel takes. Warns once of a reason.

    Raises:
        KernelRequiredError: FLASH8_KERNELS=require.
    """
    mode.fall_back(reason)
    _warn_of_refusal(reason)


@functools.cache
def _warn_of_refusal(reason: str) -> None:
    warnings.warn(
        f"flash8 has no compiled kernel for this call: {reason}; the tiled PyTorch code of the CPU "
        "backend serves it",
        stacklevel=6,
    )


def choose_num_splits(device: torch.device, geometry: "Geometry", options: "Options") -> int:
    """The number of KV splits for num_splits = 0. Without a GPU to fill, one."""
    return 1
