"""Forecasts of a run: time, nodes, cost."""
