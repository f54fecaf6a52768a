"""What torch.autocast does to the inputs of scaled_dot_product_attention."""

from flash8.call.autocast import cast_for_autocast

__all__ = ["cast_for_autocast"]
