"""Which checkpoints of a run count: Ray Train's list of them, and what is done where that cannot be used."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_states import commit, save, tiny_state

from dinoray.models.errors import DataError
from dinoray.pipeline.ray_private.train import is_complete, listed, snapshot_of
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import (
    SNAPSHOT,
    checkpoint_name,
    committed_checkpoints,
    committed_steps,
    leave_out,
    mend_snapshot,
    read_committed,
    remove_leftovers,
)

FIRST, SECOND, THIRD = (checkpoint_name(step) for step in (100, 200, 300))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three whole checkpoints, of which Ray has committed the first two."""
    run, state = tmp_path_factory.mktemp("runs") / "run", tiny_state()
    for state.step in (100, 200, 300):
        save(state, run / "checkpoints" / checkpoint_name(state.step))
    Directory(str(run)).write(f"checkpoints/{SNAPSHOT}", snapshot_of([FIRST, SECOND]))
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Directory:
    """A copy of it to damage."""
    return Directory(str(shutil.copytree(saved, tmp_path / "run")))


def on_disk(run: Directory, *names: str) -> Path:
    return Path(run.join("checkpoints", *names))


def assert_mended(run: Directory, *names: str) -> str:
    """The list is written again with `names`, as Ray loads it; return the line on it."""
    line = mend_snapshot(run)
    assert line is not None
    assert "\n" not in line
    data = run.read(f"checkpoints/{SNAPSHOT}")
    assert listed(data) == list(names)
    assert is_complete(data)
    assert mend_snapshot(run) is None
    return line


def test_names_sort_by_step() -> None:
    assert checkpoint_name(1000) == "step_00001000"
    names = [checkpoint_name(step) for step in (9, 10, 99_999, 10_000_000, 123_456_789)]
    assert names[:-1] == sorted(names[:-1])


def test_only_what_is_committed_counts(run: Directory) -> None:
    assert committed_checkpoints(run) == [FIRST, SECOND]
    assert committed_steps(run) == [100, 200]
    assert mend_snapshot(run) is None


def test_a_run_without_a_list_has_no_checkpoints_while_its_first_is_being_written(tmp_path: Path) -> None:
    run = Directory(str(tmp_path))
    assert committed_checkpoints(run) == []
    run.write(f"checkpoints/{FIRST}/student.safetensors", b"1")
    assert committed_checkpoints(run) == []
    assert mend_snapshot(run) is None


@pytest.mark.parametrize("length", [0, 1, 60])
def test_a_torn_list_is_made_again_from_the_checkpoints_that_are_whole(run: Directory, length: int) -> None:
    on_disk(run, FIRST, "meta.json").unlink()
    cut = on_disk(run, SECOND, "train_state.pt")
    cut.write_bytes(cut.read_bytes()[:-1])
    snapshot = on_disk(run, SNAPSHOT)
    snapshot.write_bytes(snapshot.read_bytes()[:length])
    assert committed_checkpoints(run) == [THIRD]
    assert len(snapshot.read_bytes()) == length, "whoever only reads must not write: Ray may be about to"
    line = assert_mended(run, THIRD)
    assert line == (f"Ray's list of checkpoints is torn; it is written again; whole checkpoints: {THIRD}")


@pytest.mark.parametrize("data", [b"[]", b"{}", b'"step"', b"\x00" * 500, b'{"checkpoint_results": 5}'])
def test_a_list_of_something_else_is_made_again(run: Directory, data: bytes) -> None:
    run.write(f"checkpoints/{SNAPSHOT}", data)
    assert "is torn" in (line := assert_mended(run, FIRST, SECOND, THIRD)) or "is not of the form" in line


def test_a_list_that_is_missing_is_made_again(run: Directory) -> None:
    run.delete(f"checkpoints/{SNAPSHOT}")
    assert committed_checkpoints(run) == [FIRST, SECOND, THIRD]
    assert "is missing" in assert_mended(run, FIRST, SECOND, THIRD)


def test_a_list_that_ray_cannot_load_is_made_again(run: Directory) -> None:
    state = json.loads(run.read(f"checkpoints/{SNAPSHOT}"))
    run.write(f"checkpoints/{SNAPSHOT}", json.dumps(state | {"checkpoint_report_indices": [0]}).encode())
    assert "is not one that Ray Train can load" in assert_mended(run, FIRST, SECOND)


@pytest.mark.parametrize("name", ["../step_00000100", "/etc", "step_00000100/", ".", "", "best", "step_1"])
def test_a_name_that_is_no_checkpoint_of_the_run_is_left_out(
    run: Directory, name: str, tmp_path: Path
) -> None:
    shutil.copytree(on_disk(run, FIRST), tmp_path / "run" / FIRST)
    run.write(f"checkpoints/{SNAPSHOT}", snapshot_of([SECOND, name]))
    assert committed_checkpoints(run) == [SECOND]
    assert f"names {name!r}, which is not a checkpoint of this run" in assert_mended(run, SECOND)


def test_a_checkpoint_that_is_listed_but_does_not_exist_is_left_out(run: Directory) -> None:
    shutil.rmtree(on_disk(run, SECOND))
    assert committed_checkpoints(run) == [FIRST]
    assert f"names {SECOND}, whose folder does not exist" in assert_mended(run, FIRST)


def test_where_no_listed_checkpoint_exists_the_whole_ones_are_used(run: Directory) -> None:
    for name in (FIRST, SECOND):
        shutil.rmtree(on_disk(run, name))
    assert_mended(run, THIRD)


def test_a_list_whose_checkpoints_are_all_gone_does_not_start_the_run_anew(run: Directory) -> None:
    for name in (FIRST, SECOND, THIRD):
        shutil.rmtree(on_disk(run, name))
    with pytest.raises(
        DataError, match=rf"names {FIRST}, whose folder .*, names {SECOND}, .*restore .* or delete"
    ):
        mend_snapshot(run)
    run.delete(f"checkpoints/{SNAPSHOT}")
    assert committed_checkpoints(run) == []


def test_a_list_torn_before_the_first_checkpoint_goes(tmp_path: Path) -> None:
    run = Directory(str(tmp_path))
    run.write(f"checkpoints/{SNAPSHOT}", b"")
    assert "whole checkpoints: none" in (mend_snapshot(run) or "")
    assert not run.exists(f"checkpoints/{SNAPSHOT}")
    assert mend_snapshot(run) is None


@pytest.mark.parametrize("data", [b"{", None])
def test_without_a_list_and_a_whole_checkpoint_the_run_does_not_start_anew(
    run: Directory, data: bytes | None
) -> None:
    on_disk(run, FIRST, "teacher.safetensors").unlink()
    on_disk(run, SECOND, "meta.json").write_text("{")
    cut = on_disk(run, THIRD, "train_state.pt")
    cut.write_bytes(cut.read_bytes()[:-1])
    run.delete(f"checkpoints/{SNAPSHOT}")
    if data is not None:
        run.write(f"checkpoints/{SNAPSHOT}", data)
    each = rf"{FIRST} lacks teacher.safetensors, {SECOND} has no whole meta.json, {THIRD} has another size"
    with pytest.raises(DataError, match=rf"none of 3 checkpoints .*{each}.* move .*/checkpoints away"):
        mend_snapshot(run)
    shutil.move(on_disk(run), on_disk(run).with_name("away"))
    assert mend_snapshot(run) is None
    assert committed_checkpoints(run) == []


def test_a_checkpoint_of_early_versions_counts_if_its_files_exist(run: Directory) -> None:
    meta = json.loads(on_disk(run, FIRST, "meta.json").read_text())
    del meta["file_bytes"]
    on_disk(run, FIRST, "meta.json").write_text(json.dumps(meta))
    for name in (SECOND, THIRD):
        shutil.rmtree(on_disk(run, name))
    run.delete(f"checkpoints/{SNAPSHOT}")
    assert read_committed(run).names == [FIRST]


def test_refused_checkpoints_are_taken_out_of_the_list(run: Directory) -> None:
    leave_out(run, {SECOND: "it lacks meta.json"})
    assert committed_checkpoints(run) == [FIRST]
    assert is_complete(run.read(f"checkpoints/{SNAPSHOT}"))


@pytest.mark.s3
def test_the_list_is_mended_on_s3_too(saved: Path, bucket: str) -> None:
    run = Directory(f"s3://{bucket}/runs/run")
    for file in sorted(saved.glob("checkpoints/*/*")):
        run.write(str(file.relative_to(saved)), file.read_bytes())
    commit(run, SECOND, FIRST, "../other", checkpoint_name(50))
    assert committed_checkpoints(run) == [FIRST, SECOND]
    line = assert_mended(run, FIRST, SECOND)
    assert "'../other'" in line
    assert checkpoint_name(50) in line
    run.write(f"checkpoints/{SNAPSHOT}", b"")
    run.delete(f"checkpoints/{THIRD}/meta.json")
    assert_mended(run, FIRST, SECOND)


def test_what_a_killed_upload_has_left_is_removed_and_a_whole_checkpoint_never(run: Directory) -> None:
    """A save that was due by time is not repeated at the same step, which would write over it."""
    torn = checkpoint_name(150)
    shutil.copytree(on_disk(run, SECOND), on_disk(run, torn))
    on_disk(run, torn, "meta.json").unlink()
    on_disk(run, SECOND, "meta.json").unlink()  # damaged, but in the list: a person may restore it
    shutil.copytree(on_disk(run, FIRST), on_disk(run, "first of all"))
    remove_leftovers(run)
    assert run.child("checkpoints").list() == [SNAPSHOT, "first of all", FIRST, SECOND, THIRD]


def test_an_upload_behind_the_newest_checkpoint_stays_until_the_run_is_past_it(tmp_path: Path) -> None:
    """Its writer may live yet, and end with meta.json, which must not stand over files that are gone."""
    run = Directory(str(tmp_path))
    run.write(f"checkpoints/{FIRST}/student.safetensors", b"1")
    remove_leftovers(run)
    assert run.child("checkpoints").list() == [FIRST]
    run.write(f"checkpoints/{SECOND}/meta.json", b"{}")
    run.write(f"checkpoints/{SNAPSHOT}", snapshot_of([SECOND]))
    remove_leftovers(run)
    assert run.child("checkpoints").list() == [SNAPSHOT, SECOND]


def test_what_was_to_be_deleted_goes_unless_it_has_been_committed_again(run: Directory) -> None:
    state = json.loads(snapshot_of([FIRST, SECOND]))
    for names, left in (([FIRST], [FIRST, SECOND, THIRD]), ([THIRD, FIRST], [FIRST, SECOND])):
        state["latest_checkpoint_result"] = {**state["checkpoint_results"][-1], "metrics": {"dropped": names}}
        run.write(f"checkpoints/{SNAPSHOT}", json.dumps(state).encode())
        remove_leftovers(run)
        assert run.child("checkpoints").list() == [SNAPSHOT, *left]
