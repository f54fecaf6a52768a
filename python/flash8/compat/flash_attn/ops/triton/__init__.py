"""What FlashAttention-2 has as Triton kernels, by torch's own operations."""
