"""Ray Train deletes the checkpoints that reports name, after its list; what a kill leaves of them never counts.

The checkpoint manager is Ray's own, as in the controller of a run, without the rest of Ray.
"""

import asyncio
import itertools
import multiprocessing
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
from ray.train import Checkpoint, CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport
from ray_releases import uses_private_ray
from tiny_states import save, tiny_state

from dinoray.pipeline.ray_private import train_checkpoints
from dinoray.pipeline.ray_private.train import DROPPED, SNAPSHOT
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import (
    META,
    checkpoint_name,
    checkpoint_names,
    committed_steps,
    mend_snapshot,
    read_committed,
    remove_leftovers,
)

pytestmark = uses_private_ray

STATE = tiny_state()
KILLED = 9
Dropped = Mapping[int, list[int]]
"""Step of a report -> the steps of the checkpoints that it names, in the order of the reports."""


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run the controller's process ends with it."""
    name = "_save_state_and_delete_old_checkpoints"
    monkeypatch.setattr(CheckpointManager, name, getattr(CheckpointManager, name))
    train_checkpoints.drop_reported(first=META)


def manager_of(run: Path) -> Any:
    context = StorageContext(run.as_posix(), "checkpoints", pyarrow.fs.LocalFileSystem())
    return CheckpointManager(CheckpointConfig(num_to_keep=None), context)


def report(run: Path, dropped: Dropped, storage: Any = None) -> None:
    """Report a checkpoint for each step, in one life of the controller. `storage`: where it deletes them."""

    async def all_of_them() -> None:
        manager = manager_of(run)
        for step, others in dropped.items():
            STATE.step = step
            folder = save(STATE, run / "checkpoints" / checkpoint_name(step))
            metrics = {"step": step, DROPPED: list(map(checkpoint_name, others))}
            checkpoint = Checkpoint(str(folder), storage or pyarrow.fs.LocalFileSystem())
            manager.register_checkpoint(_TrainingReport(checkpoint, metrics, False))

    asyncio.run(all_of_them())


def newest_of(run: Path) -> int:
    """The step that Ray Train would resume from: it has loaded the list, and found the folders."""
    return int(manager_of(run).latest_checkpoint_result.checkpoint.path[-8:])


def steps_on_disk(run: Path) -> list[int]:
    return [int(name[-8:]) for name in checkpoint_names(Directory(str(run)))]


def test_what_a_report_names_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    report(tmp_path, {10: [], 20: [], 30: [10], 40: []})
    assert committed_steps(Directory(str(tmp_path))) == steps_on_disk(tmp_path) == [20, 30, 40]
    report(tmp_path, {50: [20, 40]})  # it resumes, and its list with it
    assert committed_steps(Directory(str(tmp_path))) == steps_on_disk(tmp_path) == [30, 50]
    assert newest_of(tmp_path) == 50


def test_the_newest_is_never_deleted_nor_what_is_not_in_the_list(tmp_path: Path) -> None:
    report(tmp_path, {10: [10, 90]})
    save(STATE, tmp_path / "checkpoints" / checkpoint_name(90))
    report(tmp_path, {20: [20, 90]})
    assert committed_steps(Directory(str(tmp_path))) == [10, 20]
    assert steps_on_disk(tmp_path) == [10, 20, 90]


def test_a_folder_that_is_gone_already_ends_no_run(tmp_path: Path) -> None:
    report(tmp_path, {10: [], 20: []})

    async def after_it_is_gone() -> None:
        manager = manager_of(tmp_path)
        Directory(str(tmp_path / "checkpoints" / checkpoint_name(10))).remove()
        folder = save(STATE, tmp_path / "checkpoints" / checkpoint_name(30))
        checkpoint = Checkpoint(str(folder), pyarrow.fs.LocalFileSystem())
        manager.register_checkpoint(_TrainingReport(checkpoint, {DROPPED: [checkpoint_name(10)]}, False))

    asyncio.run(after_it_is_gone())
    assert committed_steps(Directory(str(tmp_path))) == [20, 30]


# A kill between the deletes


class Killing:
    """A local filesystem whose process is killed before it deletes one file more than `num_deletes`."""

    def __init__(self, num_deletes: int, *, backwards: bool) -> None:
        self._left, self._backwards = num_deletes, backwards

    def delete_file(self, path: str) -> None:
        if self._left == 0:
            os._exit(KILLED)
        self._left -= 1
        os.unlink(path)

    def delete_dir(self, path: str) -> None:
        for name in sorted(os.listdir(path), reverse=self._backwards):
            self.delete_file(f"{path}/{name}")
        os.rmdir(path)


def report_until_killed(run: Path, dropped: Dropped, num_deletes: int, *, backwards: bool) -> bool:
    """Report in a process of its own; return True if it was killed before it had deleted all."""

    def work() -> None:
        report(run, dropped, Killing(num_deletes, backwards=backwards))
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode in (0, KILLED)
    return process.exitcode == KILLED


@pytest.mark.parametrize("backwards", [False, True])
def test_what_a_kill_leaves_of_deletes_is_not_resumed_from_and_goes(tmp_path: Path, backwards: bool) -> None:
    """Two checkpoints of four files each are deleted; the kill comes before any of these eight."""
    for num_deletes in itertools.count():
        path = tmp_path / str(num_deletes)
        run = Directory(str(path))
        if not report_until_killed(
            path, {10: [], 20: [], 30: [], 40: [20, 10]}, num_deletes, backwards=backwards
        ):
            break
        assert read_committed(run) == ([checkpoint_name(30), checkpoint_name(40)], [])
        assert newest_of(path) == 40
        left = set(steps_on_disk(path)) - {30, 40}
        assert left
        whole = [step for step in left if (path / "checkpoints" / checkpoint_name(step) / META).exists()]
        assert len(whole) == 2 - min(2, -(-num_deletes // 4)), "meta.json goes first"
        torn = Directory(str(path.with_name(f"torn-{num_deletes}")))
        shutil.copytree(path, torn.uri)
        torn.write(f"checkpoints/{SNAPSHOT}", b"{")
        assert committed_steps(torn) == sorted([*whole, 30, 40]), (
            "without the list, what is not whole counts neither"
        )
        assert mend_snapshot(run) is None
        remove_leftovers(run)
        assert steps_on_disk(path) == [30, 40]
        report(path, {50: [30]})
        assert committed_steps(run) == steps_on_disk(path) == [40, 50]
    assert num_deletes == 8
