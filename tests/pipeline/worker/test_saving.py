"""A checkpoint is uploaded content first and meta.json last, on disks and on S3: where that is, all is complete."""

import re
from pathlib import Path

import pytest
import torch
from faults import FaultProxy
from tiny_states import after, save, tiny_state

from dinoray.models.errors import DataError
from dinoray.pipeline.storage.checkpoint_files import verify
from dinoray.pipeline.storage.files import Directory, filesystem
from dinoray.pipeline.storage.lease import LostLeaseError
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.worker.saving import Saver, upload

NAME = "step_00000002"


def upload_to(folder: Path, to: Directory) -> None:
    upload(str(folder), to, *filesystem(to.uri))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in a folder of its own."""
    return save(after(2), tmp_path_factory.mktemp("saved"))


def test_a_checkpoint_is_uploaded_to_a_disk(saved: Path, tmp_path: Path) -> None:
    to = Directory(str(tmp_path / "runs" / NAME))
    upload_to(saved, to)
    assert verify(to)["step"] == 2
    assert to.list() == sorted(file.name for file in saved.iterdir())


def test_an_upload_to_a_disk_that_fails_leaves_no_meta_data(saved: Path, tmp_path: Path) -> None:
    to = Directory(str(save(tiny_state(), tmp_path / "runs" / NAME)))
    (tmp_path / "runs" / NAME / "teacher.safetensors").unlink()
    (tmp_path / "runs" / NAME / "teacher.safetensors").mkdir()
    with pytest.raises(OSError, match=r"teacher.safetensors"):
        upload_to(saved, to)
    assert not to.exists("meta.json")


@pytest.mark.s3
def test_the_meta_data_are_the_last_that_s3_is_sent(saved: Path, proxy: FaultProxy, bucket: str) -> None:
    to = Directory(f"s3://{bucket}/runs/{NAME}")
    for _ in range(2):  # the second time over the first
        proxy.requests.clear()
        upload_to(saved, to)
        sent = [line for line in proxy.requests if re.match(r"(PUT|POST|DELETE) .*/step_00000002/.", line)]
        files = [line.partition(f"/{NAME}/")[2].partition("?")[0] for line in sent]
        assert sent[0].startswith("DELETE")
        assert sent[-1].startswith("PUT")
        assert files[0] == files[-1] == "meta.json"
        assert set(files[1:-1]) == {"student.safetensors", "teacher.safetensors", "train_state.pt"}
        assert verify(to)["step"] == 2


def test_an_upload_of_a_run_that_was_taken_over_changes_nothing(saved: Path, tmp_path: Path) -> None:
    to = Directory(str(save(tiny_state(), tmp_path / "runs" / NAME)))
    before = {name: to.read(name) for name in to.list()}
    left = [0]  # how many checks the lease is still there for

    def check() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise LostLeaseError("it was taken over")

    with pytest.raises(LostLeaseError):
        upload(str(saved), to, *filesystem(to.uri), check=check)
    assert {name: to.read(name) for name in to.list()} == before
    left[0] = 1  # it is taken over during the upload, which is then not complete
    with pytest.raises(LostLeaseError):
        upload(str(saved), to, *filesystem(to.uri), check=check)
    assert not to.exists("meta.json")


@pytest.mark.s3
def test_an_upload_to_s3_that_fails_leaves_no_meta_data(saved: Path, proxy: FaultProxy, bucket: str) -> None:
    to = Directory(f"s3://{bucket}/runs/{NAME}")
    upload_to(saved, to)
    proxy.fail("forbid", pattern="^(PUT|POST) .*train_state", times=1000)
    with pytest.raises((OSError, DataError), match=r"train_state"):
        upload_to(saved, to)
    assert not to.exists("meta.json")


@pytest.mark.parametrize("part", ["student", "center", "optimizer"])
def test_a_state_that_is_not_finite_is_saved_as_the_last_alone(part: str, tmp_path: Path) -> None:
    """In Ray's list it would take the place of one that can be resumed from. Outside of Ray Train a report raises."""
    state = after(1)
    state.step = 5
    saver = Saver(state, Quarantine(), Directory(str(tmp_path)), None)
    with pytest.raises(RuntimeError):
        saver.save(is_last=False)
    moments = next(iter(state.optimizer.state.values()))
    place = {
        "student": next(state.dino.student.parameters()),
        "center": state.dino.center,
        "optimizer": moments["exp_avg"],
    }[part]
    with torch.no_grad():
        place.view(-1)[0] = float("inf")
    saver.save(is_last=False)
    with pytest.raises(RuntimeError):
        saver.save(is_last=True)
