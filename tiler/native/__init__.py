"""Kernels in C for products of small integers, bf16 and fp32 with the operations around them, compiled once for each
instruction set.

This package has the C sources, their build, the search for the library, and the ctypes interface. It knows addresses
and sizes, not tensors or layers, and importing it loads nothing. Without the library, torch computes.
"""
