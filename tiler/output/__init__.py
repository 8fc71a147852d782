"""Files at the end of the way: pictures with their parameters, latents. Knows nothing of how they were made."""
