"""Checkpoints of other programs: read without running their code, fitted to a network, written back."""
