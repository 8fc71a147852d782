"""Kernels in C: products of small integers, bf16 and fp32 with all that surrounds them, compiled once for each
instruction set.

The C sources, how they are built and found, and ctypes. Knows addresses and sizes, not tensors or layers; importing it
loads nothing. Where the library is missing, torch computes."""
