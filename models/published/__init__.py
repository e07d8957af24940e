"""Checkpoints of other programs: read without running anything in them, fitted to a network, written back."""
