"""Hyper-parameter studies: each trial is a run of its own; search, stored trials and findings."""
