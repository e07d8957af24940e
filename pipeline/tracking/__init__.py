"""Sinks for the numbers and pictures of a run, and a reader of its logs."""
