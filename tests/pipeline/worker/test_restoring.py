"""Which checkpoint a run resumes from: the newest that is whole and finite, and what is said of those refused."""

import pickle
import shutil
from pathlib import Path

import pyarrow.fs
import pytest
import torch
from ray.train import Checkpoint
from tiny import NUM_IMAGES, tiny_config
from tiny_states import flip, save, tiny_state

from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.ray_private.train import snapshot_of
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import SNAPSHOT, checkpoint_name
from dinoray.pipeline.training.state import build_state
from dinoray.pipeline.worker.restoring import RefusedCheckpointError, restore

FIRST, SECOND, THIRD = NAMES = [checkpoint_name(step) for step in (100, 200, 300)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints."""
    run, state = tmp_path_factory.mktemp("runs") / "run", tiny_state()
    for state.step in (100, 200, 300):
        save(state, run / "checkpoints" / checkpoint_name(state.step))
    Directory(str(run)).write(f"checkpoints/{SNAPSHOT}", snapshot_of(NAMES))
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(saved, tmp_path / "run")


def newest(run: Path) -> Checkpoint:
    """What Ray Train gives its workers."""
    return Checkpoint(str(run / "checkpoints" / THIRD), pyarrow.fs.LocalFileSystem())


def refusal(run: Path) -> str:
    with pytest.raises(RefusedCheckpointError) as caught:
        restore(tiny_state(), Directory(str(run)), newest(run))
    return str(caught.value.refusal)


def spoil(checkpoint: Path, step: int) -> None:
    """Save a checkpoint with a weight that is not a number, as a version does that has not looked."""
    state = tiny_state()
    state.step = step
    with torch.no_grad():
        next(state.dino.teacher.parameters()).view(-1)[0] = float("nan")
    save(state, checkpoint)


def test_the_newest_is_restored_where_it_is_whole(run: Path) -> None:
    state = tiny_state()
    assert restore(state, Directory(str(run)), newest(run))["step"] == state.step == 300


def test_a_damaged_one_is_refused_for_the_one_before(run: Path) -> None:
    flip(run / "checkpoints" / THIRD / "student.safetensors")
    said = refusal(run)
    assert said.startswith(f"checkpoint {THIRD} is refused: student.safetensors has checksum crc32:")
    assert said.endswith(f" as written; going back to {SECOND} repeats 100 steps")
    assert "\n" not in said


def test_all_that_are_refused_are_named_with_why(run: Path) -> None:
    spoil(run / "checkpoints" / THIRD, 300)
    (run / "checkpoints" / SECOND / "meta.json").unlink()
    assert refusal(run) == (
        f"checkpoint {THIRD} is refused: the teacher has NaN or infinite values; checkpoint {SECOND} is refused: it "
        f"lacks meta.json; going back to {FIRST} repeats 200 steps"
    )


def test_without_a_whole_one_all_are_named_and_nothing_is_loaded(run: Path) -> None:
    flip(run / "checkpoints" / THIRD / "train_state.pt")
    spoil(run / "checkpoints" / SECOND, 200)
    (run / "checkpoints" / FIRST / "student.safetensors").unlink()
    state = tiny_state()
    with pytest.raises(DataError, match=r"restore one from a copy, or move .*/checkpoints away") as caught:
        restore(state, Directory(str(run)), newest(run))
    message = str(caught.value)
    assert message.startswith(
        f"no checkpoint of {run} can be resumed from: {THIRD}: train_state.pt has checksum"
    )
    assert (
        f"; {SECOND}: the teacher has NaN or infinite values; {FIRST}: it lacks student.safetensors; "
        in message
    )
    assert caught.value.exit_code == 3
    assert caught.value.raised_by_all_ranks
    assert state.step == 0


def test_settings_that_do_not_fit_are_no_reason_to_go_back(run: Path) -> None:
    state = build_state(tiny_config(optim={"name": "sgd"}), num_images=NUM_IMAGES)
    with pytest.raises(ConfigError, match=r"optim.name=sgd cannot continue a run of adamw"):
        restore(state, Directory(str(run)), newest(run))


def test_one_that_is_newer_than_rays_newest_is_not_used(run: Path) -> None:
    """Its report has not reached Ray."""
    older = Checkpoint(str(run / "checkpoints" / SECOND), pyarrow.fs.LocalFileSystem())
    assert restore(tiny_state(), Directory(str(run)), older)["step"] == 200


def test_a_refusal_goes_from_process_to_process(run: Path) -> None:
    flip(run / "checkpoints" / THIRD / "student.safetensors")
    with pytest.raises(RefusedCheckpointError) as caught:
        restore(tiny_state(), Directory(str(run)), newest(run))
    copy = pickle.loads(pickle.dumps(caught.value.refusal))
    assert copy == caught.value.refusal
    assert list(copy.why) == [THIRD]
