"""Image files: their bytes to pixels, in one way for each format."""
