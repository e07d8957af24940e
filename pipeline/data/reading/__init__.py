"""The bytes of images by their number, from any kind of source."""
