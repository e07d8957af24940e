"""`python -m jobs.submit` within this process, and a secret that must never leave it."""

import importlib

MARKER = "marker-of-a-secret-4711"


def submit(*arguments: str) -> None:
    """The job as this process would run it, its exit codes being exceptions still."""
    importlib.import_module("jobs.submit").main(arguments)
