"""Restore a run from its newest checkpoint that is whole and finite, on all train workers alike.

Ray Train knows only the newest checkpoint. Where that is refused, the workers end without an error, and the driver
takes it out of Ray's list and starts them again: so Ray's list is right whenever workers train.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from ray.train import Checkpoint

from dinoray.models.errors import DataError
from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.checkpoint_files import DamagedCheckpointError
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import committed_checkpoints, leave_out, step_of
from dinoray.pipeline.training.checkpoint import CheckpointParts, load_parts, own_copy, read_parts
from dinoray.pipeline.training.distributed import gather, rank
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.worker.spec import WorkerSpec

_REFUSAL = "refused checkpoints"
"""Name under which the run's channel keeps the Refusal."""


class Refusal(NamedTuple):
    """Checkpoints that cannot be resumed from: name -> why, newest first; and the newest one that can."""

    why: Mapping[str, str]
    used: str

    def __str__(self) -> str:
        refused = "; ".join(f"checkpoint {name} is refused: {why}" for name, why in self.why.items())
        steps = step_of(next(iter(self.why))) - step_of(self.used)
        return f"{refused}; going back to {self.used} repeats {steps} steps"


class RefusedCheckpointError(Exception):
    """The newest checkpoint is not the one to resume from. All workers raise it."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


def restore(state: TrainState, run: Directory, newest: Checkpoint) -> dict[str, Any]:
    """Load `newest`, Ray Train's newest checkpoint of `run`, into `state` and return its meta data.

    Raises RefusedCheckpointError if it is refused and an earlier one is not, and DataError if all are.
    """
    folder, _, name = newest.path.rpartition("/")
    names = gather(committed_checkpoints(run) if rank() == 0 else None)[0]
    refused: dict[str, str] = {}
    for candidate in (name, *(one for one in reversed(names) if one < name)):
        address = run.join(run_dir.CHECKPOINTS, candidate)
        parts, mine = _read(Checkpoint(f"{folder}/{candidate}", newest.filesystem), state, address)
        why = next((one for one in gather(mine) if one), None)
        if why is not None:
            refused[candidate] = why
        elif refused:
            raise RefusedCheckpointError(Refusal(refused, candidate))
        elif parts is not None:
            return load_parts(state, parts, address)
    raise _none_is_left(run, refused)


def post_refusal(channel: RunChannel, refusal: Refusal) -> None:
    """Leave the refusal for the driver; return once it has arrived."""
    channel.put(_REFUSAL, refusal)
    channel.get(_REFUSAL)


def take_refusal(spec: WorkerSpec) -> Refusal | None:
    """Return what the workers have refused, once it is out of Ray's list; None if they have refused nothing.

    For the driver, when the workers have ended.
    """
    refusal: Refusal | None = spec.channel.get(_REFUSAL)
    if refusal is not None:
        spec.check_fence()
        spec.channel.put(_REFUSAL, None)
        leave_out(spec.run.guarded(partial(spec.check_fence, is_strict=True)), refusal.why)
    return refusal


def _read(
    checkpoint: Checkpoint, state: TrainState, address: str
) -> tuple[CheckpointParts | None, str | None]:
    """Return the contents of a checkpoint, and why it is refused, if it is."""
    try:
        with own_copy(checkpoint) as folder:
            parts = read_parts(folder, device=state.device, address=address)
    except DamagedCheckpointError as error:
        return None, error.what
    return parts, parts.non_finite()


def _none_is_left(run: Directory, refused: Mapping[str, str]) -> DataError:
    each = "; ".join(f"{name}: {why}" for name, why in refused.items())
    checkpoints = run.join(run_dir.CHECKPOINTS)
    error = DataError(
        f"no checkpoint of {run.uri} can be resumed from: {each}; restore one from a copy, or move {checkpoints} away "
        "to start the run anew"
    )
    error.raised_by_all_ranks = True
    return error
