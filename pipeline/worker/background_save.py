"""At most one save of a run at a time: the state is copied between two steps, and written while training continues.

A due save waits for the one under way, because it needs the memory of its copy, unless the storage does not take that
one: then training would wait for the storage, and the due save is left out. No Ray here.
"""

import threading
from collections.abc import Callable

from dinoray.models.errors import DinorayError
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import checkpoint_name
from dinoray.pipeline.storage.unsaved import UNSAVED
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.training.state_copy import StateCopy

_POLL_SECONDS = 0.1


class BackgroundSave:
    """The save of a run that is under way, if one is. `begin` and the waits are for the training thread."""

    def __init__(self, checkpoints: Directory, *, check: Callable[[], None] = lambda: None) -> None:
        """`check` raises where this run may not write into `checkpoints` any more."""
        self._checkpoints, self._copy, self._check = checkpoints, StateCopy(), check
        self._is_over = threading.Event()
        self._is_over.set()
        self._error: BaseException | None = None

    def is_free(self, *, waits_for_storage: bool = False) -> bool:
        """Return True once no save is under way, False if the storage does not take the one that is.

        `waits_for_storage`: wait for that too. Raises the error of a save that failed for good.
        """
        while not self._is_over.wait(_POLL_SECONDS):
            # The log is written before a checkpoint: any file may hold it up.
            if UNSAVED.unsaved() and not waits_for_storage:
                return False
        self._raise_error()
        return True

    @property
    def is_idle(self) -> bool:
        """Whether no save is under way."""
        return self._is_over.is_set()

    @property
    def step(self) -> int:
        """The step of the save that is, or was last, under way."""
        return self._copy.step

    def begin(self, state: TrainState, *, num_images: int, quarantine: Quarantine) -> None:
        """Copy the state; `write` must follow, on any thread. Only while `is_free`."""
        self._copy.take(state, num_images=num_images, quarantine=quarantine)
        self._is_over.clear()

    def write(self, *, after: Callable[[], object] = lambda: None, patiently: bool = True) -> None:
        """Call `after`, then write the copy's checkpoint, meta.json last. Raises DataError.

        `patiently`: wait for storage that does not take it, as long as the run's directory does.
        """
        try:
            self._raise_error()  # Ray Train repeats some errors
            after()
            folder = self._checkpoints.child(checkpoint_name(self._copy.step))
            self._copy.write(folder if patiently else folder.patient(None), check=self._check)
        except BaseException as error:
            self._error = error if patiently else None
            raise
        finally:
            self._is_over.set()

    def check(self) -> None:
        """Raise the error of a save that failed for good."""
        if self._is_over.is_set():
            self._raise_error()

    def _raise_error(self) -> None:
        if isinstance(self._error, DinorayError):
            raise self._error
        if self._error is not None:
            raise RuntimeError(f"the checkpoint of step {self.step} could not be written") from self._error
