"""Composition roots: one main each, run with `python -m jobs.<name>`, imported by nobody."""
