"""Ops: rms_norm, and under `triton` cross_entropy, layer_norm and rotary."""
