"""Evaluation of a frozen backbone's features."""
