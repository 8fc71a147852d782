"""Arithmetic over streamed weights: what is held, which samples share a read, one file a kernel. Knows nothing of
models."""
