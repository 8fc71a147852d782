"""Decode latents into strips of pixels, and encode pixels into latents. Knows nothing of prompts or samplers."""

FACTOR = 8  # pixels along a side of a latent, for every autoencoder that tiler reads
