"""FLASH8_CHECK_INDICES=1: for debugging, what CUDA tensors of indices hold is checked on the host.

Kernels bring lengths, offsets and rows of a cache into range, so that a wrong one spoils no more
than its own call; but they do not tell. With the variable set, a call that goes to kernels first
waits for the device, reads cu_seqlens, seqused, leftpad, cache_batch_idx, page_table and descales,
and raises what the same call on CPU tensors would raise: ValueError, with the argument's name, its
value and its place. In the middle of a CUDA graph's capture nothing can be read or checked.
"""

import functools
import os
import warnings
from typing import TYPE_CHECKING

from torch import Tensor

from flash8.backends import cpu
from flash8.tensors import descales

if TYPE_CHECKING:
    from flash8.call.options import Options

_VALUES = {"": False, "0": False, "1": True}


@functools.cache
def wanted() -> bool:
    """Whether FLASH8_CHECK_INDICES is set. Read once, as FLASH8_KERNELS is.

    Raises:
        ValueError: FLASH8_CHECK_INDICES is neither 0 nor 1.
    """
    given = os.environ.get("FLASH8_CHECK_INDICES", "")
    if given not in _VALUES:
        raise ValueError(f"FLASH8_CHECK_INDICES is {given!r}; supported are '0' and '1'")
    return _VALUES[given]


def check_attention(q: Tensor, k: Tensor, options: "Options") -> None:
    """Raises ValueError on what a call's index tensors and descales hold, where that is wanted."""
    if _readable(q):
        cpu.check_indices(q, k, options)
        cpu.check_values(q, k, options)


def check_append(
    cache: Tensor,
    new: Tensor,
    starts: Tensor,
    cu_seqlens: Tensor | None,
    page_table: Tensor | None,
    kv_batch_idx: Tensor | None,
    descale: Tensor | None,
) -> None:
    """The same for new rows of a cache: all of them have a place there."""
    if _readable(cache):
        cpu.check_slots(cache, new, starts, cu_seqlens, page_table, kv_batch_idx)
        if descale is not None:
            descales.check_value("k_descale or v_descale", descale)


def check_quantize(
    x: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None, descale: Tensor | None
) -> None:
    """The same for a quantization."""
    if _readable(x):
        cpu.check_tokens(x, cu_seqlens, seqused)
        if descale is not None:
            descales.check_value("descale", descale)


def _readable(x: Tensor) -> bool:
    if not wanted() or x.device.type == "meta":
        return False
    from flash8.backends.hopper.verify import trust

    if trust.is_captured(x.device):
        _tell_about_capture()
        return False
    return True


@functools.cache
def _tell_about_capture() -> None:
    warnings.warn(
        "FLASH8_CHECK_INDICES=1 checks nothing while a CUDA graph is captured: what its tensors "
        "hold can only be read outside of it",
        stacklevel=5,
    )
