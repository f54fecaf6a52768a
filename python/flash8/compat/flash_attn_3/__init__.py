"""FlashAttention-3's package: it holds the module that is also found without it."""

__version__ = "3.0.0"
