"""The files of a run directory, and which of its checkpoints are committed.

A run directory (local or S3):

    config.yaml                 the resolved config
    environment.json            versions, hardware, git commit
    manifest.parquet            the images, listed once
    listing-0123456789ab/       what has been listed on S3, until the manifest is written
    metrics.jsonl               one line per logged step and per evaluation
    quarantine.jsonl            one line per image that could not be used
    tensorboard/NAME/           the same metrics as event files; crops, attention, features for the projector
    crops.png                   contact sheet of the crops
    attention/                  step_00001000.png: the class token's attention at each evaluation
    report.html                 all of this on one page
    tracking.json               the run's id in MLflow and W&B, if they are enabled
    result.json                 written last: the run is finished
    evaluation_step_00001000.json    what the command evaluate found
    checkpoints/
      checkpoint_manager_snapshot.json    the committed checkpoints (Ray Train's file)
      step_00001000/
        student.safetensors     backbone.* and head.*
        teacher.safetensors
        train_state.pt          optimizer, center, health: tensors and numbers, loads with weights_only=True
        meta.json               step, config and all else that is needed to rebuild the model

No Ray here.
"""

import contextlib
import json

from dinoray.models.errors import DataError
from dinoray.pipeline.ray_private.train import SNAPSHOT, TornSnapshotError, committed, snapshot_of
from dinoray.pipeline.storage.files import Directory, MissingObject

CONFIG, ENVIRONMENT, RESULT = "config.yaml", "environment.json", "result.json"
MANIFEST, METRICS, QUARANTINE = "manifest.parquet", "metrics.jsonl", "quarantine.jsonl"
CROPS, ATTENTION, TENSORBOARD = "crops.png", "attention", "tensorboard"
REPORT, TRACKING = "report.html", "tracking.json"
CHECKPOINTS = "checkpoints"
STUDENT, TEACHER = "student.safetensors", "teacher.safetensors"
TRAIN_STATE, META = "train_state.pt", "meta.json"
_CHECKPOINT, _EVALUATION = "step_", "evaluation_"
_LIST = f"{CHECKPOINTS}/{SNAPSHOT}"


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint that is taken before `step` runs."""
    return f"{_CHECKPOINT}{step:08d}"


def evaluation_name(checkpoint: str, which: str) -> str:
    """Return the name of the file with what the command evaluate found for the student or teacher of a checkpoint."""
    suffix = "" if which == "teacher" else f"_{which}"
    return f"{_EVALUATION}{checkpoint}{suffix}.json"


def evaluation_names(run: Directory) -> list[str]:
    """Return the names of all such files of a run."""
    return [name for name in run.list() if name.startswith(_EVALUATION) and name.endswith(".json")]


def committed_checkpoints(run: Directory) -> list[str]:
    """Return the names of the run's committed checkpoints, oldest first. DataError as in `committed`.

    Where Ray Train's list of them is torn, all whole checkpoints count.
    """
    try:
        return _listed_checkpoints(run)
    except TornSnapshotError:
        return _whole_checkpoints(run.child(CHECKPOINTS))


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
        names = _whole_checkpoints(run.child(CHECKPOINTS))
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
        sizes = json.loads(checkpoint.read(META))["file_bytes"]
        return all(checkpoint.size(file) == size for file, size in sizes.items())
    return False
