"""Triton-language kernels, one file an op; the only place that imports triton."""
