"""What Ray Train deletes of a run's checkpoints: those that the newest report names. The same in Ray 2.58.1 and 2.60.0.

Train itself keeps the newest checkpoints, or those with the best score, which is fixed at their report. The newest, the
best and every k-th together are no such score: it changes as newer ones come. Train's list must not name what is
deleted, and Train keeps it in memory, in its controller. So there the method that writes the list first takes out the
named ones, and deletes them once the list is written. Where Train lacks the method, it keeps the newest ones alone.
"""

import contextlib
import logging
from typing import Any

from dinoray.pipeline.ray_private.train import DROPPED
from dinoray.pipeline.ray_private.train_controller import ControllerCallback

try:
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager

    _write_list = CheckpointManager._save_state_and_delete_old_checkpoints
except (ImportError, AttributeError):
    _write_list = None

CAN_DROP = _write_list is not None and ControllerCallback is not None
"""Whether checkpoints that reports name are deleted."""

NEWEST_ALONE = (
    "warning: of the checkpoints, only the newest checkpoint.num_to_keep are kept: this version of Ray has another way "
    "to delete the rest; with ray==2.60.* the best and multiples of checkpoint.keep_every_steps are kept too"
)

logger = logging.getLogger(__name__)


def drop_callbacks(*, first: str) -> list[Any]:
    """Return callbacks for RunConfig, whose num_to_keep must be None: then Train deletes what reports name alone.

    `first`: the file that goes first, so that what a kill leaves of a checkpoint is seen not to be whole.
    """
    if not CAN_DROP:
        return []

    class Drops(ControllerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            drop_reported(first=first)

    return [Drops()]


def drop_reported(*, first: str) -> None:
    """Let the controller, whose process this is, delete the checkpoints that the newest report names."""

    def write_list_and_drop(manager: Any) -> None:
        newest = manager._latest_checkpoint_result
        names = set(newest.metrics.get(DROPPED, ())) if newest else set()
        dropped = [
            result
            for result in manager._checkpoint_results
            if result is not newest and result.checkpoint.path.rpartition("/")[2] in names
        ]
        manager._checkpoint_results = [
            result for result in manager._checkpoint_results if all(result is not gone for gone in dropped)
        ]
        for result in dropped:
            del manager._checkpoint_to_report_index[result.checkpoint]
        _write_list(manager)
        for result in dropped:
            _delete(result.checkpoint, first)

    CheckpointManager._save_state_and_delete_old_checkpoints = write_list_and_drop


def _delete(checkpoint: Any, first: str) -> None:
    """Delete a checkpoint's folder; a failure is logged, as Train does."""
    storage, path = checkpoint.filesystem, checkpoint.path
    try:
        with contextlib.suppress(FileNotFoundError):
            storage.delete_file(f"{path}/{first}")
        storage.delete_dir(path)
    except Exception:
        logger.exception("%s could not be deleted", path)
