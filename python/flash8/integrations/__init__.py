"""flash8 inside the frameworks people use; nothing here is imported by `import flash8`.

- `flash8.integrations.transformers`: an attention implementation for Hugging Face models.
- `flash8.integrations.torch`: PyTorch's scaled_dot_product_attention and varlen_attn on flash8.
"""
