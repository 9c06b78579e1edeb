"""Readers of checkpoint formats: each yields named tensors, one at a time."""
