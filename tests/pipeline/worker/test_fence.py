"""What train workers do when their run was taken over: they end it, and write nothing before that."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from leases import SHORT, record, write

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.lease import LostLeaseError
from dinoray.pipeline.storage.lease_keeper import Fence, LeaseKeeper
from dinoray.pipeline.worker.outputs import Outputs
from dinoray.pipeline.worker.spec import WorkerSpec


def spec_of(run: Directory, fence: Fence | None) -> tuple[WorkerSpec, list[Exception]]:
    """As much of a spec as the fence needs, and the errors that end the run."""
    posted: list[Exception] = []
    spec: Any = object.__new__(WorkerSpec)
    channel = SimpleNamespace(post_fatal=posted.append)
    for name, value in {"run": run, "fence": fence, "channel": channel}.items():
        object.__setattr__(spec, name, value)
    return spec, posted


def test_a_worker_whose_run_was_taken_over_ends_it(tmp_path: Path) -> None:
    run = Directory(str(tmp_path))
    with LeaseKeeper(run, tell=print, timing=SHORT) as lease:
        spec, posted = spec_of(run, lease.fence)
        spec.check_fence()
        write(run, record("b"))
        with pytest.raises(LostLeaseError):
            spec.check_fence()
        assert [str(error).partition(" because")[0] for error in posted] == [
            f"{run.uri} was taken over by host-b pid 7 at 2023-11-14 22:13:20 UTC,"
        ]


def test_without_a_fence_nothing_is_checked(tmp_path: Path) -> None:
    spec, posted = spec_of(Directory(str(tmp_path)), None)
    spec.check_fence()
    assert posted == []


WRITES: dict[str, Callable[[Any], object]] = {
    "start": lambda outputs: outputs.__init__(outputs._spec, None),
    "log_step": lambda outputs: outputs.log_step(None, {}, None),
    "log_evaluation": lambda outputs: outputs.log_evaluation(1, None),
    "sync_log": lambda outputs: outputs.sync_log(),
    "close": lambda outputs: outputs.close(failed=True),
}


@pytest.mark.parametrize("name", WRITES)
def test_outputs_of_a_run_that_was_taken_over_are_not_written(name: str, tmp_path: Path) -> None:
    run = Directory(str(tmp_path))
    write(run, record("b"))
    spec, posted = spec_of(run, Fence(run, "a"))
    outputs = cast(Any, object.__new__(Outputs))
    outputs._spec, outputs._checked_at = spec, time.monotonic() - 60
    with pytest.raises(LostLeaseError):  # and no AttributeError of what would be written with
        WRITES[name](outputs)
    assert len(posted) == 1
