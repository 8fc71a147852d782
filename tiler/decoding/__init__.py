"""Latents → strips of pixels, and pixels → latents. Knows nothing of prompts or samplers."""
