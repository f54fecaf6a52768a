"""FlashAttention's own import names and signatures, computed by flash8.

- `flash8.compat.flash_attn`: FlashAttention-2's package.

Everything here adapts arguments and calls the public functions of flash8. Nothing is imported by
`import flash8`.
"""
