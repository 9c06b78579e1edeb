"""Executes step plans on a device: weights, KV cache, slot state."""
