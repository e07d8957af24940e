"""A run that trackers follow."""

from pathlib import Path

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking.mlflow_wandb import TrackedRun


def run_in(folder: Path) -> TrackedRun:
    """A run directory that a page can be made of."""
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    return TrackedRun("first", "0123456789ab", "plants", {"optim.base_lr": 0.1}, Directory(str(folder)))
