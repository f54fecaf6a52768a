"""Losses: cross_entropy."""
