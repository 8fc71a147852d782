"""The ceiling: what the process uses, what fits, and what happens when it does not. Knows nothing of diffusion."""
