"""FlashAttention's own import names and signatures, computed by flash8.

- `flash8.compat.flash_attn`: FlashAttention-2's package (and what is left of FlashAttention-1's).
- `flash8.compat.flash_attn_interface`, `flash8.compat.flash_attn_3`: FlashAttention-3's modules.
- `flash8.compat.vllm_flash_attn`: vLLM's `vllm_flash_attn`.
- `install()` registers FlashAttention's under their bare names, for code that cannot be edited.

Everything here adapts arguments and calls the public functions of flash8. Nothing is imported by
`import flash8`.
"""

from flash8.compat.installation import Installation, install, uninstall

__all__ = ["Installation", "install", "uninstall"]
