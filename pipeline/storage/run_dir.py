"""File names in a run directory, and its committed checkpoints. No Ray here."""

import contextlib
import json

from dinoray.models.errors import DataError
from dinoray.pipeline.ray_private.train import SNAPSHOT, TornSnapshotError, committed, snapshot_of
from dinoray.pipeline.storage.files import Directory, MissingObject

_CHECKPOINT = "step_"
_LIST = f"checkpoints/{SNAPSHOT}"


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint that is taken before `step` runs."""
    return f"{_CHECKPOINT}{step:08d}"


def committed_checkpoints(run: Directory) -> list[str]:
    """Return the names of the run's committed checkpoints, oldest first. DataError as in `committed`.

    Where Ray Train's list of them is torn, all whole checkpoints count.
    """
    try:
        return _listed_checkpoints(run)
    except TornSnapshotError:
        return _whole_checkpoints(run.child("checkpoints"))


def committed_steps(run: Directory) -> list[int]:
    """Return the steps of the run's committed checkpoints, ascending."""
    return sorted(int(name.removeprefix(_CHECKPOINT)) for name in committed_checkpoints(run))


def mend_snapshot(run: Directory) -> list[str] | None:
    """Write Ray Train's torn list of checkpoints again and return it; None where it is sound or does not exist.

    Only for a run that nobody trains: while Ray writes the list, it looks torn too.
    """
    try:
        _listed_checkpoints(run)
    except TornSnapshotError:
        names = _whole_checkpoints(run.child("checkpoints"))
        if names:
            run.write(_LIST, snapshot_of(names))
        else:
            run.delete(_LIST)  # torn at the first checkpoint ever
        return names
    return None


def _listed_checkpoints(run: Directory) -> list[str]:
    """Return what Ray Train's list holds; empty before the first checkpoint. Raises as `committed`."""
    try:
        return committed(run.read(_LIST), file=run.join(_LIST))
    except MissingObject:
        return []


def _whole_checkpoints(checkpoints: Directory) -> list[str]:
    """Raises DataError where there are checkpoints, but none is whole: the run would start anew without a word."""
    names = [name for name in checkpoints.list() if name.startswith(_CHECKPOINT)]
    whole = [name for name in names if _is_whole(checkpoints.child(name))]
    if names and not whole:
        raise DataError(
            f"{checkpoints.join(SNAPSHOT)} is torn, and none of {len(names)} checkpoints beside it can be shown to be "
            f"whole: move {checkpoints.uri} away to start the run anew"
        )
    return whole


def _is_whole(checkpoint: Directory) -> bool:
    """True if all files have the sizes that meta.json gives; older versions did not write them."""
    with contextlib.suppress(DataError, ValueError, KeyError, TypeError, AttributeError):
        sizes = json.loads(checkpoint.read("meta.json"))["file_bytes"]
        return all(checkpoint.size(file) == size for file, size in sizes.items())
    return False
