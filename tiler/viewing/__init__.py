"""`tiler view`: a picture cut into tiles of many sizes, and a page on loopback that shows them. Knows no models."""
