"""Save a run through Ray Train: all ranks report a checkpoint, rank 0 writes its files on a thread of Ray's.

Ray Train adds the checkpoint to its list once they are written, and deletes others, which rank 0 names, after that.
"""

import contextlib
import time
from collections.abc import Callable, Collection
from functools import partial

import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode

from dinoray.models.errors import DataError, DinorayError
from dinoray.pipeline.ray_private.train import DROPPED
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.run_dir import (
    checkpoint_name,
    committed_checkpoints,
    committed_steps,
    leave_out,
)
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.distributed import all_reduce_max
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.training.state_copy import is_finite
from dinoray.pipeline.worker.agreement import Agreement
from dinoray.pipeline.worker.background_save import BackgroundSave
from dinoray.pipeline.worker.outputs import Outputs
from dinoray.pipeline.worker.retention import Retention
from dinoray.pipeline.worker.save_clock import SaveClock
from dinoray.pipeline.worker.spec import WorkerSpec

_OUTDATED = "outdated checkpoints"
"""Name under which the run's channel keeps the names of the checkpoints that the last evaluations leave behind."""
_LAST_SECONDS = 10.0
"""Longest wait for the log after the stream has failed."""


class Saver:
    """Saves the checkpoints of a run. All ranks call it alike; rank 0, which has `outputs`, writes."""

    def __init__(
        self,
        state: TrainState,
        quarantine: Quarantine,
        spec: WorkerSpec,
        outputs: Outputs | None,
        agreement: Agreement,
        *,
        under_way: Callable[[], Collection[int]] = tuple,
    ) -> None:
        """`under_way`: on rank 0, the steps whose evaluations are; their checkpoints are kept until these are known."""
        self._state, self._quarantine, self._spec = state, quarantine, spec
        self._outputs, self._agreement, self._under_way_steps = outputs, agreement, under_way
        self._under_way = BackgroundSave(
            spec.run.child(run_dir.CHECKPOINTS), check=partial(spec.check_fence, is_strict=True)
        )
        self._logged: Callable[[], None] = lambda: None
        self._clock = SaveClock(spec.checkpoint, now=time.monotonic())
        self._retention = Retention(spec.checkpoint, committed_steps(spec.run) if outputs else [])
        self.saved_step, self._replaces = state.step, True

    def save(self, *, is_last: bool, waits_for_storage: bool) -> None:
        """Begin to save this step; it is written while training continues.

        Skip a step with NaN or infinite values, which would take the place of a good one in the run's list, unless it
        `is_last`. Skip a step while the storage does not take an earlier one, unless `waits_for_storage`. Raises the
        error of an earlier save that failed for good, on rank 0.
        """
        began = time.monotonic()
        is_free = self._under_way.is_free(waits_for_storage=waits_for_storage)
        if not self._agreement.is_everywhere(is_free):
            if self._outputs:  # other ranks copy nothing, so they know no step
                self._note(self._not_written_yet)
        elif (is_finite := self._is_finite()) or is_last:
            self._copy()
            if self._outputs:
                self._logged = self._outputs.sync_log()
            self._report(self._upload, replaces=is_finite)
            chosen = self._clock.saved(began, time.monotonic())
            if self._outputs and chosen:
                self._outputs.note(chosen)
        else:
            self._note("weights, centre or optimizer have NaN or infinite values")

    def save_last_step(self, count_images: Callable[[], None]) -> None:
        """Save after the stream has failed, and wait for it, unless that fails too: the storage may be the same."""
        failure: DinorayError | str | None = None
        try:
            count_images()
            if not self._under_way.is_free():
                failure = self._not_written_yet
            elif self._outputs:
                self._copy()
                logged = partial(self._outputs.sync_log(), _LAST_SECONDS)
                self._under_way.write(after=logged, patiently=False)
        except DinorayError as error:
            failure = error
        if self._agreement.is_everywhere(failure is None):
            # That it is finite is not known. Others go at the next save, when the run resumes.
            self._report(lambda checkpoint, _: checkpoint, replaces=False)
        else:
            self._note(str(failure))

    def wait(self) -> None:
        """Return when the save under way is written. Raises its error if it fails for good."""
        self._under_way.is_free(waits_for_storage=True)

    def finish(self) -> None:
        """Have the checkpoints deleted that are not kept now that the last scores are known; after the last save."""
        if self._outputs and self._replaces:
            scores = self._outputs.scores.by_step
            outdated = self._retention.drop(scores, under_way=self._under_way_steps())
            self._spec.channel.put(_OUTDATED, list(map(checkpoint_name, outdated)))
            self._spec.channel.get(_OUTDATED)  # it has arrived

    def check(self) -> None:
        """Raise the error of a save that failed for good."""
        self._under_way.check()

    def is_due(self) -> bool:
        """Return True on rank 0 if a save is due by time. One under way is not waited for: it would cost time."""
        return self._under_way.is_idle and self._clock.is_due(time.monotonic())

    @property
    def _not_written_yet(self) -> str:
        return f"the checkpoint of step {self._under_way.step} is not written yet"

    def _note(self, why: str) -> None:
        if self._outputs:
            self._outputs.note(f"warning: no checkpoint of step {self._state.step}: {why}")
            self._clock.left_out(time.monotonic())

    def _is_finite(self) -> bool:
        """Return True on all ranks if all that a checkpoint holds is finite."""
        moments = (value for of_one in self._state.optimizer.state.values() for value in of_one.values())
        mine = is_finite([*self._state.dino.state_dict().values(), *moments])
        return not all_reduce_max(torch.tensor(float(not mine), device=self._state.device))

    def _copy(self) -> None:
        """Copy the state, on rank 0."""
        if self._outputs:
            num_images = self._spec.num_images
            self._under_way.begin(self._state, num_images=num_images, quarantine=self._quarantine)

    def _report(self, upload: Callable[[Checkpoint, str], Checkpoint], *, replaces: bool) -> None:
        """Report the copy as a checkpoint; Ray Train calls `upload` on rank 0, on a thread.

        `replaces`: whether earlier ones may be deleted once it is in Ray's list.
        """
        checkpoint, name = None, checkpoint_name(self._state.step)
        dropped: list[int] = []
        if self._outputs:
            scores = self._outputs.scores.by_step
            dropped = self._retention.add(
                self._state.step, scores, replaces=replaces, under_way=self._under_way_steps()
            )
            storage = ray.train.get_context().get_storage()
            path = storage.build_checkpoint_path_from_name(name)
            checkpoint = Checkpoint(path, storage.storage_filesystem)
        ray.train.report(
            {"step": self._state.step, DROPPED: list(map(checkpoint_name, dropped))},
            checkpoint=checkpoint,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,  # it is not local: the files are written where they stay
            checkpoint_upload_fn=upload,
        )
        self.saved_step, self._replaces = self._state.step, replaces
        if self._outputs:
            self._outputs.restart_meters()

    def _upload(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        """Write the files of `checkpoint`. An error ends the run: Ray Train would restart the workers."""
        try:
            self._under_way.write(after=self._logged)  # a checkpoint's metrics must be written before it
        except DinorayError as error:
            self._spec.channel.post_fatal(error)
            raise
        self._spec.channel.post("checkpoint", step=self._under_way.step, name=name)
        return checkpoint


def drop_outdated(spec: WorkerSpec) -> None:
    """Delete the checkpoints that `Saver.finish` has named, in Ray's list first. For the driver, once nobody trains."""
    outdated = spec.channel.get(_OUTDATED) or []
    there = committed_checkpoints(spec.run)
    outdated = [name for name in outdated if name in there and name != there[-1]]
    if not outdated:
        return
    spec.check_fence()
    run = spec.run.guarded(partial(spec.check_fence, is_strict=True))
    leave_out(run, outdated)
    for name in outdated:
        folder = run.child(run_dir.CHECKPOINTS).child(name)
        with contextlib.suppress(DataError):  # it costs space, and nothing else
            folder.delete(run_dir.META)  # first: what a kill leaves is seen not to be whole
            folder.remove()
