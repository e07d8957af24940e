"""The names in a run directory, and which of its checkpoints are committed. No Ray here."""

from pipeline.ray_private.train import SNAPSHOT, committed
from pipeline.storage.files import Directory, MissingObject


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint taken before `step` runs."""
    return f"step_{step:08d}"


def committed_checkpoints(run: Directory) -> list[str]:
    """Names of the run's committed checkpoints, oldest first; empty when there is none. DataError as `committed`."""
    file = f"checkpoints/{SNAPSHOT}"
    try:
        snapshot = run.read(file)
    except MissingObject:
        return []
    return committed(snapshot, file=run.join(file))


def committed_steps(run: Directory) -> list[int]:
    """Steps of the run's committed checkpoints, ascending."""
    return sorted(int(name.removeprefix("step_")) for name in committed_checkpoints(run))
