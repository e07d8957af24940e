"""What Ray Train does with the checkpoints of a run, as of 2.58 to 2.60, without Ray.

A controller starts the workers with the newest checkpoint of its list, polls them, and adds a checkpoint to the list
once all workers have reported it. It keeps the list in memory, writes it over the one in the store, and deletes the
checkpoints after that which it does not keep: older ones than `num_to_keep`, or those that the report names, as
pipeline/ray_private/train_checkpoints.py has it. It looks at the store only when it starts. Of a lease it knows
nothing.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import ray
from simulated_time import Task

from dinoray.pipeline.ray_private.train import DROPPED
from dinoray.pipeline.storage.run_dir import CHECKPOINTS, SNAPSHOT


class BrokenListError(Exception):
    """Ray's CheckpointManagerInitializationError: it cannot load its list."""


class Files(NamedTuple):
    """The store as Ray uses it; names are below the folder of checkpoints. `write` is not atomic."""

    read: Callable[[str], bytes | None]
    write: Callable[[str, bytes], object]
    exists: Callable[[str], bool]
    """Whether a folder is there."""
    delete: Callable[[str], object]
    """Delete a folder."""


class RayCheckpoints:
    """Ray's checkpoint manager: the list in memory and in the store. A test compares it with the real one."""

    def __init__(self, files: Files, *, num_to_keep: int | None) -> None:
        """Load the list. Raises BrokenListError."""
        self._files, self._num_to_keep = files, num_to_keep
        self.names: list[str] = []
        self._metrics: dict[str, dict[str, Any]] = {}
        self._indices: dict[str, int] = {}
        self._num_reports = 0
        data = files.read(SNAPSHOT)
        if data is not None:
            self._load(data)

    @property
    def newest(self) -> str | None:
        """The checkpoint that workers start from."""
        return self.names[-1] if self.names else None

    def add(self, name: str, metrics: dict[str, Any]) -> None:
        """Add a checkpoint that all workers have reported."""
        self.names.append(name)
        self._metrics[name], self._indices[name] = metrics, self._num_reports
        self._num_reports += 1
        kept = self.names[-self._num_to_keep :] if self._num_to_keep else self.names
        kept = [one for one in kept if one == name or one not in metrics.get(DROPPED, ())]
        old, self.names = [one for one in self.names if one not in kept], kept
        self._files.write(SNAPSHOT, json.dumps(self._state()).encode())
        for one in old:
            self._files.delete(one)

    def _state(self) -> dict[str, Any]:
        results = [self._result(name) for name in self.names]
        return {
            "ray_version": ray.__version__,
            "checkpoint_results": results,
            "checkpoint_report_indices": [self._indices[name] for name in self.names],
            "latest_checkpoint_result": results[-1],
            "pending_training_results": [],
            "pending_validation_specs": [],
            "current_report_index": self._num_reports,
            "validated_checkpoint_dir_names": [],
            "timed_out_validation_checkpoint_dir_names": [],
            "failed_validation_checkpoint_dir_names": [],
        }

    def _result(self, name: str) -> dict[str, Any]:
        return {"version": 0, "checkpoint_dir_name": name, "metrics": self._metrics[name]}

    def _load(self, data: bytes) -> None:
        try:
            state = json.loads(data)
            results = state["checkpoint_results"]
        except (ValueError, KeyError) as error:
            raise BrokenListError("torn") from error
        self.names = [result["checkpoint_dir_name"] for result in results]
        self._metrics = {result["checkpoint_dir_name"]: result["metrics"] for result in results}
        self._indices = dict(zip(self.names, state["checkpoint_report_indices"], strict=True))
        self._num_reports = state["current_report_index"]
        if gone := [name for name in self.names if not self._files.exists(name)]:
            raise BrokenListError(f"{CHECKPOINTS}/{gone[0]} does not exist")


class Workers:
    """One start of the train workers: what they have reported, and how they ended."""

    def __init__(self, world_size: int, newest: str | None) -> None:
        self.world_size, self.newest = world_size, newest
        self.reports: list[tuple[str, dict[str, Any]]] = []
        """Of all workers, in order."""
        self.uploads: list[Task] = []
        self.another_rank_died = False
        self.are_done = False
        self.have_failed = False


class TrainingFailedError(Exception):
    """The workers have failed too often."""


def control(
    checkpoints: RayCheckpoints,
    start: Callable[[str | None], Workers],
    end: Callable[[Workers], object],
    *,
    sleep: Callable[[float], object],
    max_failures: int,
    chance: Callable[[], float],
) -> None:
    """What the controller does: start workers until they are done. Raises TrainingFailedError."""
    for _ in range(max_failures + 1):
        workers = start(checkpoints.newest)
        while not workers.are_done or workers.reports:
            sleep(1.0)
            # Of workers that have failed, the report may have arrived before.
            if workers.reports and (not workers.have_failed or chance() < 0.5):
                checkpoints.add(*workers.reports.pop(0))
            if workers.have_failed:
                break
        end(workers)
        if not workers.have_failed:
            return
    raise TrainingFailedError
