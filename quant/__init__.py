"""Makes smaller weights: AWQ, SmoothQuant, KV scales."""
