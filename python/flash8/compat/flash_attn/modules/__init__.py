"""Modules: mha."""
