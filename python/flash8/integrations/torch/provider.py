"""flash8 as a flash attention implementation of PyTorch (2.11 or newer)."""

from typing import Any

import torch

#: The argument of `torch.nn.attention.activate_flash_attention_impl`.
IMPLEMENTATION_NAME = "flash8"

_OPS_MODULE = "flash8.integrations.torch.fa3_ops"


def register() -> str:
    """Makes flash8 known to `torch.nn.attention` and returns its name. Activates nothing.

    PyTorch's support for FlashAttention-3 does the work: it checks the tensors, lays them out and
    calls `torch.ops.flash_attn_3`, which is flash8 then (`fa3_ops`). So its limits hold: CUDA
    tensors on compute capability 9.0, fp16, bf16 or (forward only) float8_e4m3fn, no dropout.

    Raises:
        RuntimeError: this PyTorch has no registry of flash attention implementations.
    """
    attention = torch.nn.attention
    if not hasattr(attention, "register_flash_attention_impl"):
        raise RuntimeError(
            "flash attention implementations can be registered from torch 2.11 on, found "
            f"{torch.__version__}; flash8.integrations.torch.sdpa() works with this one"
        )
    attention.register_flash_attention_impl(IMPLEMENTATION_NAME, register_fn=_activate)
    return IMPLEMENTATION_NAME


def _activate() -> Any:
    """Called on activation; the handle it returns undoes it."""
    from torch.nn.attention._fa3 import register_flash_attention_fa3

    return register_flash_attention_fa3(module_path=_OPS_MODULE)
