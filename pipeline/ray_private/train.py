"""The file in which Ray Train keeps which checkpoints of a run are committed.

Train restores from this file, but has no public function that lists the checkpoints of a run that is not running.
Train writes over it in place, so a process that is killed meanwhile leaves a torn file. Its form is the same in Ray
2.58.1, 2.59.0 and 2.60.0.
"""

import importlib.metadata
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from dinoray.models.errors import DataError

SNAPSHOT = "checkpoint_manager_snapshot.json"
DROPPED = "dropped"
"""In the metrics of a report: names of the checkpoints that are deleted once its own is in the list."""
_LIST, _NAME, _INDICES, _LATEST = (
    "checkpoint_results",
    "checkpoint_dir_name",
    "checkpoint_report_indices",
    "latest_checkpoint_result",
)


class BadSnapshotError(DataError):
    """The snapshot cannot be used; the message says what it `is`, for a sentence."""


def listed(snapshot: bytes) -> list[str]:
    """Return the names in a snapshot, as they stand there.

    Raises BadSnapshotError for one that breaks off, because its writer was killed or is still writing, and for one of
    another form: taken for one without checkpoints, the run would start anew.
    """
    try:
        state = json.loads(snapshot)
    except (ValueError, RecursionError) as error:
        raise BadSnapshotError("torn") from error
    try:
        return [str(result[_NAME]) for result in state[_LIST]]
    except (KeyError, TypeError) as error:
        raise BadSnapshotError("not of the form of Ray Train 2.58 to 2.60") from error


def dropped(snapshot: bytes) -> list[str]:
    """Return the names in a snapshot of the checkpoints that were to be deleted after it was written."""
    newest = json.loads(snapshot).get(_LATEST) or {}
    return [str(name) for name in newest.get("metrics", {}).get(DROPPED, ())]


def is_complete(snapshot: bytes) -> bool:
    """Return True if Ray Train can load a snapshot that `listed` can read."""
    state, names = json.loads(snapshot), listed(snapshot)
    required = _state_of(["any"]).keys() - {_LATEST, "ray_version"}
    if not required <= state.keys() or not isinstance(state[_INDICES], list):
        return False
    latest = state.get(_LATEST)
    is_known = latest is None or (isinstance(latest, dict) and latest.get(_NAME) in names)
    return is_known and len(set(names)) == len(names) == len(state[_INDICES])


def snapshot_of(names: Sequence[str]) -> bytes:
    """Return the snapshot of a run whose committed checkpoints are `names`, oldest first."""
    return json.dumps(_state_of(names)).encode()


def _state_of(names: Sequence[str]) -> dict[str, Any]:
    results = [{"version": 0, _NAME: name, "metrics": {}} for name in names]
    return {
        "ray_version": _ray_version(),
        _LIST: results,
        _INDICES: list(range(len(names))),
        _LATEST: results[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(names),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }


@cache
def _ray_version() -> str:
    return importlib.metadata.version("ray")  # parses a file
