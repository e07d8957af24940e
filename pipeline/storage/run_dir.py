"""File names in a run directory, and its committed checkpoints. No Ray here."""

from pipeline.ray_private.train import SNAPSHOT, committed
from pipeline.storage.files import Directory, MissingObject


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint that is taken before `step` runs."""
    return f"step_{step:08d}"


def committed_checkpoints(run: Directory) -> list[str]:
    """Return the names of the run's committed checkpoints, oldest first. DataError as in `committed`."""
    file = f"checkpoints/{SNAPSHOT}"
    try:
        snapshot = run.read(file)
    except MissingObject:
        return []
    return committed(snapshot, file=run.join(file))


def committed_steps(run: Directory) -> list[int]:
    """Return the steps of the run's committed checkpoints, ascending."""
    return sorted(int(name.removeprefix("step_")) for name in committed_checkpoints(run))
