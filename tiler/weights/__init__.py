"""Reads tensors from files. Knows nothing of what a layer means."""
