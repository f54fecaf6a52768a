"""The facts that flash8's design assumes of the hardware; `facts.py` measures them."""
