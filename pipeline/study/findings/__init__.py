"""Findings of a study, with their certainty."""
