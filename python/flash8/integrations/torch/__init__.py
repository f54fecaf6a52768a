"""PyTorch's own attention functions on flash8.

CUDA tensors: `register()` makes flash8 a flash attention implementation of PyTorch; after

    torch.nn.attention.activate_flash_attention_impl(flash8.integrations.torch.register())

`F.scaled_dot_product_attention` (its flash backend) and `torch.nn.attention.varlen.varlen_attn`
run on flash8. Any device, CPU included: inside `with sdpa():` this thread's calls of
`F.scaled_dot_product_attention` go to flash8 where that computes exactly what was asked.
"""

from flash8.integrations.torch.provider import IMPLEMENTATION_NAME, register
from flash8.integrations.torch.sdpa import Report, sdpa

__all__ = ["IMPLEMENTATION_NAME", "Report", "register", "sdpa"]
