"""Where tensors come from. Knows nothing of what a layer means."""
