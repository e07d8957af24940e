"""The file in which Ray Train keeps which checkpoints of a run are committed.

Train restores from this file, but has no public function that lists the checkpoints of a run that is not running.
"""

import json

from models.errors import DataError

SNAPSHOT = "checkpoint_manager_snapshot.json"
_LIST, _NAME = "checkpoint_results", "checkpoint_dir_name"


def committed(snapshot: bytes, *, file: str) -> list[str]:
    """Return the names of the committed checkpoints in a snapshot, ascending.

    Raises DataError for a snapshot of another form: taken for one without checkpoints, the run would start anew.
    """
    try:
        return sorted({result[_NAME] for result in json.loads(snapshot)[_LIST]})
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is not a list of checkpoints as Ray Train 2.60 writes it ({error!r}): resume the run with the "
            "version of Ray that began it"
        ) from error
