"""The doors: what tritonserver's Python backend loads. No torch, no transformers."""
