"""Bytes of a checkpoint that change after it was written are found before anything is loaded, and named."""

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file, save_file
from tiny_states import after, commit, flip, save, tiny_state

from dinoray.models.errors import DataError
from dinoray.pipeline.storage.checkpoint_files import DamagedCheckpointError, newest_meta, read_meta, verify
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import checkpoint_name
from dinoray.pipeline.training.checkpoint import (
    is_finite,
    load_checkpoint,
    read_frozen,
    read_parts,
)
from dinoray.pipeline.training.init_weights import read_weights

CONTENT = ("student.safetensors", "teacher.safetensors", "train_state.pt")
EARLIER = ROOT / "tests" / "end_to_end" / "earlier_run" / "checkpoints" / "step_00000009"
"""A checkpoint without checksums."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in a run directory, after step 2."""
    return save(after(2), tmp_path_factory.mktemp("run") / "checkpoints" / checkpoint_name(2))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(saved, tmp_path / "run" / "checkpoints" / saved.name)


def change_meta(folder: Path, **values: Any) -> None:
    """Change meta.json as someone does who does not know of its checksum."""
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | values, indent=1))


def refused(folder: Path) -> str:
    """What loading the checkpoint into a state says, which must be untouched."""
    state = tiny_state()
    before = {name: x.clone() for name, x in state.dino.state_dict().items()}
    with pytest.raises(DamagedCheckpointError) as caught:
        load_checkpoint(state, folder)
    assert all(torch.equal(x, before[name]) for name, x in state.dino.state_dict().items())
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"checkpoint {folder} is damaged: ")
    return str(caught.value)


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("file", CONTENT)
def test_one_changed_bit_is_found_with_the_checksum_expected_and_found(
    folder: Path, file: str, place: float
) -> None:
    expected = json.loads((folder / "meta.json").read_text())["checksums"][file]
    flip(folder / file, place=place)
    message = refused(folder)
    assert f"{file} has checksum crc32:" in message
    assert f"not {expected} as written" in message
    assert f"dinoray doctor {folder.parent.parent}" in message


@pytest.mark.parametrize("file", CONTENT[:2])
def test_one_changed_bit_is_found_where_one_network_alone_is_read(folder: Path, file: str) -> None:
    flip(folder / file, place=0.9)
    which = file.partition(".")[0]
    with pytest.raises(
        DamagedCheckpointError, match=rf"s3://b/run/checkpoints/step_00000002 .*{file} has checks"
    ):
        read_frozen(folder, which, address="s3://b/run/checkpoints/step_00000002")  # type: ignore[arg-type]
    other = "teacher" if which == "student" else "student"
    read_frozen(folder, other)  # type: ignore[arg-type]


def test_one_changed_bit_is_found_where_a_run_starts_from_weights(folder: Path) -> None:
    commit(Directory(str(folder.parent.parent)), folder.name)
    assert read_weights(str(folder.parent.parent)).is_own
    flip(folder / "teacher.safetensors", place=0.5)
    with pytest.raises(
        DamagedCheckpointError, match=rf"{folder} is damaged: teacher.safetensors has checksum"
    ):
        read_weights(str(folder.parent.parent))


def test_each_changed_bit_of_the_meta_data_is_found_or_changes_nothing(folder: Path) -> None:
    file = folder / "meta.json"
    data, meta = file.read_bytes(), read_meta(Directory(str(folder)))
    found = 0
    for place in range(0, len(data), 7):
        file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        try:
            assert verify(Directory(str(folder))) == meta, place
        except DataError:
            found += 1
    assert found > len(data) / 7 / 2  # the others are spaces between values


def test_a_changed_value_of_the_meta_data_is_named(folder: Path) -> None:
    change_meta(folder, num_images=41)
    assert "meta.json has checksum crc32:" in refused(folder)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": 3}'])
def test_meta_data_that_are_something_else_are_named(folder: Path, data: bytes) -> None:
    (folder / "meta.json").write_bytes(data)
    assert "meta.json is not that of a checkpoint" in refused(folder)


def test_checksums_that_are_missing_are_missed(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    del meta["checksums"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert "meta.json has no checksums" in refused(folder)


@pytest.mark.parametrize("file", CONTENT)
def test_a_file_that_is_cut_off_is_named_with_its_sizes(folder: Path, file: str) -> None:
    size = (folder / file).stat().st_size
    (folder / file).write_bytes((folder / file).read_bytes()[:1000])
    assert f"{file} has 1,000 bytes, not {size:,} as written" in refused(folder)


def test_files_of_two_checkpoints_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    """Each file is whole, and of the size that is expected."""
    other = save(after(3), tmp_path / "other")
    for file in CONTENT:
        shutil.copy(other / file, folder / file)
        assert f"{file} has checksum" in refused(folder)
        shutil.copytree(other, folder, dirs_exist_ok=True)
        break
    assert "meta.json is of step 3, the folder's name of step 2" in refused(folder)


# Steps


def test_a_folder_whose_name_is_of_another_step_is_refused(folder: Path) -> None:
    renamed = folder.rename(folder.with_name(checkpoint_name(3)))
    assert "meta.json is of step 2, the folder's name of step 3" in refused(renamed)
    load_checkpoint(tiny_state(), renamed.rename(renamed.with_name("best")))  # a name of one's own


def test_a_train_state_of_another_step_is_refused(folder: Path) -> None:
    """As written by a program that has the checksums right."""
    train_state = torch.load(folder / "train_state.pt", weights_only=True)
    torch.save(train_state | {"step": 7}, folder / "train_state.pt")
    without_checksums(folder)
    assert "train_state.pt is of step 7, meta.json of step 2" in refused(folder)


def without_checksums(folder: Path) -> None:
    """Make it a checkpoint of the format before."""
    meta = json.loads((folder / "meta.json").read_text())
    for key in ("checksums", "file_bytes"):
        del meta[key]
    (folder / "meta.json").write_text(json.dumps(meta | {"format": 2}))


# Earlier versions


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    parts = read_parts(EARLIER)
    assert parts.meta["step"] == 9
    assert parts.non_finite() is None
    assert read_frozen(EARLIER).weights
    cut = shutil.copytree(EARLIER, tmp_path / EARLIER.name)
    (cut / "teacher.safetensors").write_bytes((cut / "teacher.safetensors").read_bytes()[:-1])
    with pytest.raises(DamagedCheckpointError, match=r"teacher.safetensors cannot be read"):
        read_parts(cut)


# Pickles


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


class NotTensors:
    """A class that no checkpoint has."""


def repacked(file: Path, state: bytes) -> None:
    """Put another pickle into a file of torch."""
    packed = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(packed, "w") as new:
        for name in old.namelist():
            new.writestr(name, state if name.endswith("data.pkl") else old.read(name))
    file.write_bytes(packed.getvalue())


@pytest.mark.parametrize("kind", ["runs", "class", "no pickle"])
@pytest.mark.parametrize("knows_checksums", [False, True])
def test_a_train_state_with_code_in_it_is_refused_and_not_run(
    folder: Path, tmp_path: Path, kind: str, knows_checksums: bool
) -> None:
    state = {
        "runs": pickle.dumps(Evil(tmp_path / "ran")),
        "class": pickle.dumps(NotTensors()),
        "no pickle": b"%%",
    }
    repacked(folder / "train_state.pt", state[kind])
    if knows_checksums:
        without_checksums(folder)
    message = refused(folder)
    assert not (tmp_path / "ran").exists()
    assert "train_state.pt" in message
    assert "weights_only" not in message
    assert "torch.load" not in message
    if knows_checksums:
        assert "nothing in it was run" in message
        # The same where a run starts from it.
        with pytest.raises(DataError) as caught:
            read_weights(str(folder))
        assert not (tmp_path / "ran").exists()
        assert "weights_only" not in str(caught.value)


def test_the_code_that_a_train_state_wants_to_run_is_named(folder: Path, tmp_path: Path) -> None:
    repacked(folder / "train_state.pt", pickle.dumps(Evil(tmp_path / "ran"), protocol=2))
    without_checksums(folder)
    assert "train_state.pt wants getattr to be called, which no checkpoint needs" in refused(folder)
    assert not (tmp_path / "ran").exists()


# Finite


@pytest.mark.parametrize("part", ["the student", "the teacher", "the centre", "the optimizer's state"])
def test_parts_that_are_not_finite_are_named(saved: Path, part: str) -> None:
    parts = read_parts(saved)
    assert parts.non_finite() is None
    moments = next(iter(parts.train_state["optimizer"]["state"].values()))
    place = {
        "the student": next(iter(parts.student.values())),
        "the teacher": next(iter(parts.teacher.values())),
        "the centre": parts.train_state["center"],
        "the optimizer's state": moments["exp_avg"],
    }[part]
    place.view(-1)[0] = float("inf")
    assert parts.non_finite() == f"{part} has NaN or infinite values"


def test_whole_numbers_are_finite() -> None:
    assert is_finite([torch.tensor(3), torch.tensor(True), 5])
    assert not is_finite([torch.tensor(3), torch.tensor(float("nan"))])


def test_meta_data_say_whether_all_is_finite(tmp_path: Path) -> None:
    state = tiny_state()
    assert read_meta(Directory(str(save(state, tmp_path))))["finite"]
    state.dino.center[0] = float("nan")
    assert not read_meta(Directory(str(save(state, tmp_path))))["finite"]


# What is read of a run before it trains


def test_the_newest_meta_data_that_are_whole_are_used(tmp_path: Path) -> None:
    run = Directory(str(tmp_path))
    assert newest_meta(run) is None
    names = [checkpoint_name(step) for step in (1, 2)]
    state = tiny_state()
    for state.step, name in enumerate(names, start=1):
        save(state, tmp_path / "checkpoints" / name)
    commit(run, *names)
    assert (newest_meta(run) or {})["step"] == 2
    (tmp_path / "checkpoints" / names[1] / "meta.json").write_text("{")
    assert (newest_meta(run) or {})["step"] == 1
    (tmp_path / "checkpoints" / names[0] / "meta.json").write_text("{")
    with pytest.raises(DamagedCheckpointError, match=rf"{names[1]} is damaged"):
        newest_meta(run)


def test_the_files_are_those_of_safetensors_itself(saved: Path, tmp_path: Path) -> None:
    for which in ("student", "teacher"):
        weights = load_file(saved / f"{which}.safetensors")
        save_file(weights, tmp_path / "other")
        assert (tmp_path / "other").read_bytes() == (saved / f"{which}.safetensors").read_bytes()


def test_an_error_of_a_damaged_checkpoint_goes_from_process_to_process() -> None:
    error = DamagedCheckpointError("s3://b/run/checkpoints/step_00000002", "it lacks meta.json")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.what, copy.exit_code) == (str(error), error.what, 3)
