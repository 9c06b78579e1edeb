"""Decides what each step computes: queue, KV blocks, prefix cache, token budget. Pure Python, no torch."""
