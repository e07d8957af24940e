"""Tar files: their members, images and labels."""
