"""Layers: rotary."""
