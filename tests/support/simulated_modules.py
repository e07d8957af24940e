"""Puts modules of the product into a simulated world: its store, its clock and its Ray, in place of the real ones.

Each module keeps its own code. What it blocks on, or reaches the outside by, is replaced by name.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from simulated_ray import Workers
from simulated_store import SimulatedStore
from simulated_time import Clocked

from dinoray.pipeline.storage import (
    files,
    lease_keeper,
    lease_store,
    object_writer,
    retry,
    s3,
    unsaved,
    waiting,
)
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.lease import Holder
from dinoray.pipeline.storage.run_dir import CHECKPOINTS
from dinoray.pipeline.storage.unsaved import UnsavedWatch
from dinoray.pipeline.storage.waiting import Patient
from dinoray.pipeline.training import state_copy
from dinoray.pipeline.worker import background_save, restoring, saving

PATIENCE_SECONDS = 900.0
RUN = "run"
"""Key of the run's directory."""


class Checkpoint(NamedTuple):
    """In place of Ray's."""

    path: str
    filesystem: None

    def to_directory(self, folder: str) -> str:
        here = Directory(f"s3://{self.path}").patient(PATIENCE_SECONDS)
        names = here.list()
        if not names:
            raise FileNotFoundError(self.path)
        for name in names:
            with open(f"{folder}/{name}", "wb") as file:
                file.write(here.read(name))
        return folder


def _report(
    metrics: dict[str, Any], *, checkpoint: Any, checkpoint_dir_name: str, checkpoint_upload_fn: Any, **_: Any
) -> None:
    """What ray.train.report does: the upload is a thread, and the report follows. Other ranks upload nothing."""
    if checkpoint is None:
        return
    time = _now().time
    process = time.current.process
    workers: Workers = process.values["workers"]

    def upload() -> None:
        try:
            checkpoint_upload_fn(checkpoint, checkpoint_dir_name)
        except Exception:
            workers.have_failed = True
            return
        workers.reports.append((checkpoint_dir_name, metrics))

    workers.uploads.append(time.spawn(process, upload))


_world: list[Any] = []


def _now() -> Any:
    """The simulated_run.World that is under way."""
    return _world[-1]


@contextlib.contextmanager
def under_way(world: Any) -> Iterator[None]:
    """`world` is what the modules under test live in."""
    _world.append(world)
    try:
        yield
    finally:
        _world.pop()


class _PerProcess:
    """An object that modules keep once a process."""

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self._name, self._make = name, make

    def __getattr__(self, name: str) -> Any:
        values = _now().time.current.process.values
        if self._name not in values:
            values[self._name] = self._make()
        return getattr(values[self._name], name)


def _this_process(job: str = "") -> Holder:
    world = _now()
    process = world.time.current.process
    return Holder(f"lease {process.pid}", process.host, process.pid, process.host, "", job, world.time.now)


def _is_gone(holder: Holder) -> bool | None:
    world = _now()
    if holder.machine != world.time.current.process.host:
        return None
    return not any(job.driver.pid == holder.pid and job.driver.is_alive for job in world.jobs)


def simulate(patch: pytest.MonkeyPatch) -> None:
    """Have the modules under test live in the world that is `under_way`."""
    clocked = Clocked(lambda: _now().time)

    def client(*options: object, **more: object) -> SimulatedStore:
        return _now().store

    for module in (files, s3, lease_store, object_writer):
        patch.setattr(module, "s3_client", client)
    patch.setattr(s3, "read_body", lambda body: body.read())
    patch.setattr(retry, "time", clocked)
    patch.setitem(retry.retrying.__kwdefaults__, "sleep", clocked.sleep)
    patch.setitem(retry.retrying.__kwdefaults__, "rng", lambda: _now().chance.random())

    def patient(seconds: float, **options: Any) -> Patient:
        rng = _now().chance.random
        return Patient(seconds, sleep=clocked.sleep, clock=clocked.monotonic, rng=rng, **options)

    for module in (files, unsaved):
        patch.setattr(module, "Patient", patient)

    def watch() -> UnsavedWatch:
        made = UnsavedWatch(clocked.monotonic)
        made.report = lambda *_: None
        return made

    for module in (unsaved, background_save):
        patch.setattr(module, "UNSAVED", _PerProcess("unsaved", watch))
    patch.setattr(waiting.WATCH, "report", lambda *_: None)
    patch.setattr(lease_keeper, "clock", clocked.monotonic)
    patch.setattr(lease_keeper, "time", clocked)
    patch.setattr(lease_keeper, "threading", clocked)
    patch.setattr(lease_keeper, "this_process", _this_process)
    patch.setattr(lease_keeper, "is_gone", _is_gone)
    patch.setattr(background_save, "threading", clocked)
    patch.setattr(background_save, "_POLL_SECONDS", 0.5)
    patch.setattr(state_copy, "ThreadPoolExecutor", clocked.ThreadPoolExecutor)
    patch.setattr(restoring, "Checkpoint", Checkpoint)
    patch.setattr(saving, "Checkpoint", Checkpoint)
    storage = SimpleNamespace(
        build_checkpoint_path_from_name=lambda name: f"bucket/{RUN}/{CHECKPOINTS}/{name}",
        storage_filesystem=None,
    )
    context = SimpleNamespace(get_storage=lambda: storage)
    train = SimpleNamespace(get_context=lambda: context, report=_report)
    patch.setattr(saving, "ray", SimpleNamespace(train=train))
