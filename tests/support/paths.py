"""Where the project is, and the data that some tests use where they are there."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent
START_UP = SUPPORT / "start_up"
"""On the path of processes that are to start fast."""
SHARED = ROOT.parent / "shared" / "data"
