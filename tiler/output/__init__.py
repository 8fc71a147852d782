"""The output files: pictures with their parameters, and latents. Knows nothing of how they were made."""
