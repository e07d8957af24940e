"""A save is written while training continues: content first and meta.json last, and again while the storage refuses."""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import FaultProxy
from small_disk import SmallDisk, small_disk
from tiny import NUM_IMAGES, tiny_batch
from tiny_states import after, save, tiny_state

from dinoray.models.errors import DataError
from dinoray.pipeline.storage import unsaved, waiting
from dinoray.pipeline.storage.checkpoint_files import verify
from dinoray.pipeline.storage.files import Directory, Unreachable
from dinoray.pipeline.storage.lease import LostLeaseError
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.training.step import train_step
from dinoray.pipeline.worker.background_save import BackgroundSave

NAME = "step_00000002"
FILES = ("student.safetensors", "teacher.safetensors", "train_state.pt")
EVER = 1_000_000


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are short, and a file counts as not written after its first failure."""
    monkeypatch.setattr(waiting, "MAX_SECONDS", 0.1)
    monkeypatch.setattr(unsaved, "NOTED_SECONDS", 0.0)
    monkeypatch.setattr(unsaved.UNSAVED, "_since", {})
    monkeypatch.setattr(unsaved.UNSAVED, "report", lambda *_: None)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 4 << 20) as mounted:
        yield mounted


def begin(under_way: BackgroundSave, state: TrainState) -> None:
    under_way.begin(state, num_images=NUM_IMAGES, quarantine=Quarantine())


def on_thread(work: Callable[[], object]) -> threading.Thread:
    def run() -> None:
        with contextlib.suppress(DataError):  # BackgroundSave keeps it
            work()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def saved(under_way: BackgroundSave, state: TrainState) -> None:
    begin(under_way, state)
    under_way.write()


# What is written


def test_a_checkpoint_is_written_as_it_is_saved_elsewhere(tmp_path: Path) -> None:
    state, checkpoints = after(2), Directory(str(tmp_path / "run"))
    saved(BackgroundSave(checkpoints), state)
    assert verify(checkpoints.child(NAME))["step"] == 2
    assert checkpoints.child(NAME).list() == sorted((*FILES, "meta.json"))
    for file in FILES:
        expected = (save(state, tmp_path / "elsewhere") / file).read_bytes()
        assert checkpoints.child(NAME).read(file) == expected


def test_a_save_of_a_run_that_was_taken_over_changes_nothing(tmp_path: Path) -> None:
    to = Directory(str(save(tiny_state(), tmp_path / NAME)))
    before = {name: to.read(name) for name in to.list()}
    left = [0]  # how many checks the lease is still there for

    def check() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise LostLeaseError("it was taken over")

    with pytest.raises(LostLeaseError):
        saved(BackgroundSave(Directory(str(tmp_path)), check=check), after(2))
    assert {name: to.read(name) for name in to.list()} == before
    left[0] = 1  # it is taken over during the save, which is then not complete
    with pytest.raises(LostLeaseError):
        saved(BackgroundSave(Directory(str(tmp_path)), check=check), after(2))
    assert not to.exists("meta.json")


def test_a_save_that_fails_leaves_no_meta_data(tmp_path: Path) -> None:
    folder = save(tiny_state(), tmp_path / NAME)
    (folder / "teacher.safetensors").unlink()
    (folder / "teacher.safetensors").mkdir()
    under_way = BackgroundSave(Directory(str(tmp_path)).patient(900))
    with pytest.raises(DataError, match=r"teacher.safetensors: Is a directory"):
        saved(under_way, after(2))
    assert not (folder / "meta.json").exists()
    for call in (under_way.check, under_way.is_free, under_way.write):
        with pytest.raises(DataError, match=r"teacher.safetensors: Is a directory"):
            call()


@pytest.mark.s3
def test_the_meta_data_are_the_last_that_s3_is_sent(proxy: FaultProxy, bucket: str) -> None:
    checkpoints = Directory(f"s3://{bucket}/runs")
    for _ in range(2):  # the second time over the first
        proxy.requests.clear()
        saved(BackgroundSave(checkpoints), after(2))
        sent = [line for line in proxy.requests if re.match(r"(PUT|POST|DELETE) .*/step_00000002/.", line)]
        files = [line.partition(f"/{NAME}/")[2].partition("?")[0] for line in sent]
        assert sent[0].startswith("DELETE")
        assert sent[-1].startswith("PUT")
        assert files[0] == files[-1] == "meta.json"
        assert set(files[1:-1]) == set(FILES)
        assert verify(checkpoints.child(NAME))["step"] == 2


@pytest.mark.s3
def test_a_save_to_s3_that_fails_leaves_no_meta_data(proxy: FaultProxy, bucket: str) -> None:
    checkpoints = Directory(f"s3://{bucket}/runs")
    saved(BackgroundSave(checkpoints), after(2))
    proxy.fail("forbid", pattern="^(PUT|POST) .*train_state", times=EVER)
    with pytest.raises(DataError, match=r"train_state"):
        saved(BackgroundSave(checkpoints.patient(900)), after(2))
    assert not checkpoints.child(NAME).exists("meta.json")


def test_what_must_be_there_before_a_checkpoint_is_awaited(tmp_path: Path) -> None:
    checkpoints = Directory(str(tmp_path))
    under_way, logged, begun = BackgroundSave(checkpoints), threading.Event(), threading.Event()
    begin(under_way, after(2))
    thread = on_thread(lambda: under_way.write(after=lambda: (begun.set(), logged.wait())))
    begun.wait()
    assert not checkpoints.child(NAME).exists("meta.json")
    logged.set()
    thread.join()
    assert verify(checkpoints.child(NAME))


# Storage that refuses


@pytest.mark.s3
def test_a_save_that_the_store_refuses_for_a_while_is_that_of_its_step(
    proxy: FaultProxy, bucket: str, tmp_path: Path
) -> None:
    state, checkpoints = after(2), Directory(f"s3://{bucket}/runs").patient(60)
    expected = save(state, tmp_path)
    under_way = BackgroundSave(checkpoints)
    proxy.fail("slow_down", pattern="^(PUT|POST|DELETE) ", times=EVER)
    begin(under_way, state)
    thread = on_thread(under_way.write)
    assert not under_way.is_free()  # a due save is left out
    train_step(state, tiny_batch(state.config, seed=2))  # and training continues
    under_way.check()
    assert not checkpoints.child(NAME).exists("meta.json")
    proxy.heal()
    assert under_way.is_free(waits_for_storage=True)
    thread.join()
    assert verify(checkpoints.child(NAME))["step"] == 2
    for file in FILES:
        assert checkpoints.child(NAME).read(file) == (expected / file).read_bytes()
    begin(under_way, state)
    under_way.write()
    assert verify(checkpoints.child("step_00000003"))["step"] == 3


@pytest.mark.s3
def test_a_save_that_the_store_never_takes_is_given_up_on_by_name(proxy: FaultProxy, bucket: str) -> None:
    under_way = BackgroundSave(Directory(f"s3://{bucket}/runs").patient(0.5))
    proxy.fail("slow_down", pattern="^(PUT|POST) ", times=EVER)
    with pytest.raises(Unreachable, match=rf"s3://{bucket}/runs/{NAME}/.*: no answer.*SlowDown"):
        saved(under_way, after(2))
    with pytest.raises(Unreachable, match="SlowDown"):
        under_way.is_free(waits_for_storage=True)


def test_a_save_on_a_full_disk_is_written_once_there_is_space(disk: SmallDisk) -> None:
    checkpoints = Directory(str(disk.folder)).patient(60)
    under_way, filler = BackgroundSave(checkpoints), disk.fill()
    begin(under_way, after(2))
    thread = on_thread(under_way.write)
    assert not under_way.is_free()
    filler.unlink()
    thread.join()
    assert under_way.is_free()
    assert verify(checkpoints.child(NAME))["step"] == 2


def test_a_disk_that_stays_full_is_named_with_the_bytes_of_the_file(disk: SmallDisk) -> None:
    under_way = BackgroundSave(Directory(str(disk.folder)).patient(0.2))
    disk.fill()
    expected = (
        rf"^{disk.folder}/{NAME}/student.safetensors: no success for 0 s, .*"
        r"[\d,]{6,} bytes are needed, [\d,]+ are free; free space on its disk"
    )
    with pytest.raises(DataError, match=expected):
        saved(under_way, after(2))


def test_an_impatient_save_fails_at_once_and_later_ones_may_follow(disk: SmallDisk) -> None:
    under_way, filler = BackgroundSave(Directory(str(disk.folder)).patient(900)), disk.fill()
    begin(under_way, after(2))
    with pytest.raises(DataError, match="No space left on device"):
        under_way.write(patiently=False)
    filler.unlink()
    assert under_way.is_free()
    saved(under_way, after(2))


# Who waits


def test_a_due_save_waits_for_a_slow_one(tmp_path: Path) -> None:
    under_way, may_end, came = BackgroundSave(Directory(str(tmp_path))), threading.Event(), list[str]()
    begin(under_way, after(2))
    writer = on_thread(lambda: under_way.write(after=lambda: (may_end.wait(), came.append("written"))))
    waiter = on_thread(lambda: (under_way.is_free(), came.append("free")))
    waiter.join(0.3)
    assert came == []
    may_end.set()
    waiter.join()
    writer.join()
    assert came == ["written", "free"]


def test_a_save_that_waits_for_the_log_holds_up_no_training(tmp_path: Path) -> None:
    """The log is written before a checkpoint."""
    under_way, logged = BackgroundSave(Directory(str(tmp_path))), threading.Event()
    unsaved.UNSAVED.failed(f"{tmp_path}/metrics.jsonl", "no space", 900)
    begin(under_way, after(2))
    writer = on_thread(lambda: under_way.write(after=logged.wait))
    assert not under_way.is_free()
    unsaved.UNSAVED.answered(f"{tmp_path}/metrics.jsonl")
    logged.set()
    assert under_way.is_free()
    writer.join()


def test_an_error_that_is_a_bug_is_raised_too(tmp_path: Path) -> None:
    under_way = BackgroundSave(Directory(str(tmp_path)))
    begin(under_way, after(2))
    with pytest.raises(KeyError):
        under_way.write(after=lambda: {}["log"])
    with pytest.raises(RuntimeError, match="the checkpoint of step 2 could not be written"):
        under_way.is_free()
