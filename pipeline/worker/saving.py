"""Save a run: checkpoint files in a local folder, uploaded in the background, meta.json last."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow.fs
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode

from dinoray.models.errors import DinorayError
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.checkpoint_files import FILES
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import checkpoint_name
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.checkpoint import is_finite
from dinoray.pipeline.training.distributed import all_reduce_max
from dinoray.pipeline.training.step import TrainState
from dinoray.pipeline.worker.agreement import Agreement
from dinoray.pipeline.worker.outputs import Outputs

_CHUNK_BYTES = 64 << 20


class Saver:
    """Saves the checkpoints of a run. All ranks call it alike; rank 0, which has `outputs`, writes."""

    def __init__(
        self,
        state: TrainState,
        quarantine: Quarantine,
        run: Directory,
        outputs: Outputs | None,
        *,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`check` raises where this run may not write into `run` any more."""
        self._state, self._quarantine, self._outputs, self._check = state, quarantine, outputs, check
        self._checkpoints = run.child(run_dir.CHECKPOINTS)
        self.saved_step = state.step

    def save(self, *, is_last: bool) -> None:
        """Save this step; skip one with NaN or infinite values, which would take the place of a good one in the run's
        list, unless it `is_last`."""
        if is_last or self._is_finite():
            self._report(self._written())
        elif self._outputs:
            self._outputs.note(
                f"warning: no checkpoint of step {self._state.step}: "
                "weights, centre or optimizer have NaN or infinite values"
            )

    def save_last_step(self, agreement: Agreement, count_images: Callable[[], None]) -> None:
        """Save after the stream has failed, unless that fails too: the storage may be the same."""
        checkpoint, failure = None, None
        try:
            count_images()
            checkpoint = self._written()
        except DinorayError as error:
            failure = error
        if agreement.is_everywhere(failure is None):
            self._report(checkpoint)
        elif self._outputs:
            self._outputs.note(f"warning: no checkpoint of step {self._state.step}: {failure}")

    def _is_finite(self) -> bool:
        """Return True on all ranks if all that a checkpoint holds is finite."""
        moments = list(self._state.optimizer.state.values())
        mine = all(map(is_finite, (self._state.dino.state_dict(), *moments)))
        return not all_reduce_max(torch.tensor(float(not mine), device=self._state.device))

    def _written(self) -> Checkpoint | None:
        """Return the checkpoint in a local folder, on rank 0."""
        if not self._outputs:
            return None
        return Checkpoint.from_directory(str(self._outputs.write_checkpoint(self._state, self._quarantine)))

    def _report(self, checkpoint: Checkpoint | None) -> None:
        # Uploads in the background and removes the folder afterwards.
        ray.train.report(
            {"step": self._state.step},
            checkpoint=checkpoint,
            checkpoint_dir_name=checkpoint_name(self._state.step),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=partial(_upload, self._checkpoints, self._check),
        )
        self.saved_step = self._state.step
        if self._outputs:
            self._outputs.restart_meters()


def _upload(
    checkpoints: Directory, check: Callable[[], None], checkpoint: Checkpoint, name: str
) -> Checkpoint:
    """Copy a local checkpoint to Ray's storage, of which `checkpoints` is the address, and return it there."""
    storage = ray.train.get_context().get_storage()
    path = storage.build_checkpoint_path_from_name(name)
    upload(checkpoint.path, checkpoints.child(name), storage.storage_filesystem, path, check=check)
    return Checkpoint(path, storage.storage_filesystem)


def upload(
    folder: str,
    to: Directory,
    filesystem: pyarrow.fs.FileSystem,
    path: str,
    *,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Copy the checkpoint in the local `folder` to `to`, which is `path` of `filesystem`.

    meta.json, which shows that a checkpoint is complete, comes last; that of an earlier attempt goes first. `check` is
    called before each of the two. After an upload Ray Train commits the checkpoint and deletes old ones.
    """
    check()
    to.delete(run_dir.META)
    filesystem.create_dir(path)
    here = pyarrow.fs.LocalFileSystem()

    def copy(file: str) -> None:
        pyarrow.fs.copy_files(
            f"{folder}/{file}",
            f"{path}/{file}",
            source_filesystem=here,
            destination_filesystem=filesystem,
            chunk_size=_CHUNK_BYTES,
            use_threads=False,
        )

    files = [file for file in FILES if file != run_dir.META]
    with ThreadPoolExecutor(len(files)) as pool:
        list(pool.map(copy, files))
    check()
    to.write(run_dir.META, Directory(folder).read(run_dir.META))
