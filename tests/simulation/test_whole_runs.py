"""Whole runs with drawn faults, simulated: no image is lost or repeated, and no driver writes over another's files.

Each seed is a run from its first driver to its last (tests/support/simulated_run.py), with its own faults. To repeat
one:

    SEED=123 python -m pytest tests/simulation -k one_seed
"""

import asyncio
import gc
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from simulated_faults import Storm
from simulated_modules import simulate
from simulated_ray import BrokenListError, Files, RayCheckpoints

from dinoray.pipeline.storage.run_dir import SNAPSHOT

DANGERS = [
    "a driver was killed during a deletion",
    "a driver was killed during a renewal",
    "a driver was killed during an upload",
    "a driver was killed between upload and commit",
    "a list was mended",
    "a save was left out, as the one before was not written",
    "a worker was killed during an upload",
    "a worker was killed between upload and commit",
    "a write after a takeover, that was about to be made",
    "another rank died",
    "ended by InUseError",
    "ended by LostLeaseError",
    "ended by TrainingFailedError",
    "ended by Unreachable",
    "fell back from a refused checkpoint",
    "resumed",
    "resumed with another world size",
    "the lease was taken over while its holder lived",
    "the lease was taken over while its holder's workers lived",
    *(f"the newest checkpoint was damaged: {kind}" for kind in ("cut", "flipped", "missing")),
]


@pytest.fixture(scope="module", autouse=True)
def _simulated() -> Iterator[None]:
    gc.disable()
    with pytest.MonkeyPatch.context() as patch:
        simulate(patch)
        yield
    gc.enable()


def run(seed: int) -> Counter[str]:
    """Simulate one run."""
    storm = Storm(seed)
    try:
        return storm.run()
    except Exception as error:
        again = f"SEED={seed} python -m pytest tests/simulation -k one_seed"
        raise AssertionError(f"{error!r}; {storm.world.settings}; again: {again}") from error


def check(seeds: range) -> None:
    """Simulate the runs of all seeds; each danger must have been met."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        counts += run(seed)
        if seed % 100 == 0:
            gc.collect()
    print(*(f"{counts[danger]:6} {danger}" for danger in DANGERS), sep="\n")
    assert [danger for danger in DANGERS if not counts[danger]] == []


@pytest.mark.timeout(1800)
def test_a_run_ends_whole_whatever_happens_to_it() -> None:
    check(range(1000))


@pytest.mark.timeout(7200)
@pytest.mark.nightly
def test_many_runs_end_whole_whatever_happens_to_them() -> None:
    check(range(1000, 11_000))


@pytest.mark.skipif("SEED" not in os.environ, reason="runs the seed in SEED")
def test_one_seed() -> None:
    print(run(int(os.environ["SEED"])))


def test_a_seed_is_the_same_run_each_time() -> None:
    assert run(7) == run(7)


# The model of Ray


def real_files(folder: Path) -> Files:
    def read(name: str) -> bytes | None:
        return (folder / name).read_bytes() if (folder / name).exists() else None

    def delete(name: str) -> None:
        (folder / name).rmdir()

    def write(name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)

    return Files(read, write, lambda name: (folder / name).exists(), delete)


@pytest.mark.parametrize("num_to_keep", [1, 2, None])
def test_the_model_of_rays_checkpoint_manager_does_what_the_real_one_does(
    num_to_keep: int | None, tmp_path: Path
) -> None:
    """Both load the other's list, and keep the same checkpoints."""
    from ray.train import Checkpoint, CheckpointConfig
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
    from ray.train.v2._internal.execution.storage import StorageContext
    from ray.train.v2._internal.execution.training_report import _TrainingReport

    folders = [tmp_path / "real", tmp_path / "model"]
    for folder in folders:
        folder.mkdir()
    real, model = folders

    def manager() -> Any:
        storage = StorageContext(str(tmp_path), "real")
        return CheckpointManager(CheckpointConfig(num_to_keep=num_to_keep), storage)

    async def go_on(names: list[str]) -> None:
        theirs, ours = manager(), RayCheckpoints(real_files(model), num_to_keep=num_to_keep)
        for name in names:
            for folder in folders:
                (folder / name).mkdir()
            ours.add(name, {"step": 1})
            theirs.register_checkpoint(_TrainingReport(Checkpoint(str(real / name)), {"step": 1}, False))
        assert theirs.latest_checkpoint_result.checkpoint.path == str(real / str(ours.newest))

    asyncio.run(go_on(["step_00000001", "step_00000002", "step_00000003"]))
    asyncio.run(go_on(["step_00000004"]))
    assert json.loads((real / SNAPSHOT).read_bytes()) == json.loads((model / SNAPSHOT).read_bytes())
    assert sorted(path.name for path in real.iterdir() if path.is_dir()) == sorted(
        path.name for path in model.iterdir() if path.is_dir()
    )


@pytest.mark.parametrize("data", [b'{"checkpoint_results": [', b""])
def test_a_torn_list_is_not_loaded_by_the_model_either(data: bytes, tmp_path: Path) -> None:
    (tmp_path / SNAPSHOT).write_bytes(data)
    with pytest.raises(BrokenListError):
        RayCheckpoints(real_files(tmp_path), num_to_keep=None)
