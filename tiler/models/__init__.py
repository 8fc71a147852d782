"""Model families: build on the meta device, encode prompts, predict noise. Knows nothing of canvases and tiles."""
