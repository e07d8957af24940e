"""The file in which Ray Train keeps which checkpoints of a run are committed.

Train restores from this file, but has no public function that lists the checkpoints of a run that is not running.
Train writes over it in place, so a process that is killed meanwhile leaves a torn file. Its form is the same in Ray
2.58.1, 2.59.0 and 2.60.0.
"""

import importlib.metadata
import json
import re
from collections.abc import Sequence

from dinoray.models.errors import DataError

SNAPSHOT = "checkpoint_manager_snapshot.json"
_LIST, _NAME = "checkpoint_results", "checkpoint_dir_name"
_PLAIN = re.compile(r"[\w-]+")


class TornSnapshotError(DataError):
    """The snapshot breaks off: its writer was killed, or is still writing."""


def committed(snapshot: bytes, *, file: str) -> list[str]:
    """Return the names of the committed checkpoints in a snapshot, ascending.

    Raises TornSnapshotError for one that breaks off, and DataError for one of another form: taken for one without
    checkpoints, the run would start anew.
    """
    try:
        state = json.loads(snapshot)
    except ValueError as error:
        raise TornSnapshotError(f"{file} is torn ({error})") from error
    try:
        names = sorted({result[_NAME] for result in state[_LIST]})
        strange = [name for name in names if not _PLAIN.fullmatch(name)]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{file} is not a list of checkpoints as Ray Train 2.58 to 2.60 writes it ({error!r}): resume the run "
            "with the version of Ray that began it"
        ) from error
    if strange:
        raise DataError(
            f"{file} names {strange[0]!r}, which is not a checkpoint of this run: take it out of the file"
        )
    return names


def snapshot_of(names: Sequence[str]) -> bytes:
    """Return the snapshot of a run whose committed checkpoints are `names`, oldest first."""
    results = [{"version": 0, _NAME: name, "metrics": {}} for name in names]
    state = {
        "ray_version": importlib.metadata.version("ray"),
        _LIST: results,
        "checkpoint_report_indices": list(range(len(names))),
        "latest_checkpoint_result": results[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(names),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    return json.dumps(state).encode()
