"""`tiler view`: cut a picture into tiles of many sizes, and show them on a page on loopback. Knows nothing of
models."""
