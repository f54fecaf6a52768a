"""What tensors hold and how they lie: float8, descales, tokens, V with its keys innermost.

The ground of the package: nothing here knows of a call, a backend or a torch op.
"""
