"""`dinoray doctor RUN`: what it says of the files of a run or study, and its exit code."""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from fresh_python import run_python
from leases import record, write
from tiny_run import write_run
from tiny_states import flip, save, tiny_state

from dinoray.jobs.cluster.run_checks import check_files
from dinoray.models.errors import ConfigError
from dinoray.pipeline.ray_private.train import snapshot_of
from dinoray.pipeline.storage import lease_keeper
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.lease_keeper import LeaseKeeper
from dinoray.pipeline.storage.run_dir import SNAPSHOT, checkpoint_name

NAMES = [checkpoint_name(step) for step in (7, 8, 9)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints."""
    run, state = write_run(tmp_path_factory.mktemp("runs") / "tiny"), tiny_state()
    for state.step in (8, 9):
        save(state, run / "checkpoints" / checkpoint_name(state.step))
    (run / "checkpoints" / SNAPSHOT).write_bytes(snapshot_of(NAMES))
    (run / "metrics.jsonl").write_text('{"step": 8, "loss": 1.0}\n{"step": 9, "loss": 1.0}\n')
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(whole, tmp_path / "tiny")


def lines(address: Path | str) -> list[str]:
    """What is found, as it is printed."""
    return [f"{f.verdict} {f.name} {f.text}" for f in check_files(str(address))]


def exit_code(run: Path | str, *more: str) -> int:
    try:
        importlib.import_module("jobs.doctor").main([str(run), *more])
    except SystemExit as end:
        return int(str(end.code))
    return 0


def test_a_whole_run_is_said_to_be_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(run) == 0
    printed = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert {verdict for verdict, *_ in printed} == {"ok"}
    assert [name for _, name, _ in printed] == ["metrics", "list", *["checkpoint"] * 3, "resume"]
    texts = [text for *_, text in printed]
    assert texts[0] == "metrics.jsonl: 2 lines, to step 9"
    assert texts[1] == "3 checkpoints are committed"
    for name, text in zip(NAMES, texts[2:5], strict=True):
        size = sum(file.stat().st_size for file in (run / "checkpoints" / name).iterdir()) / 1e6
        assert text == f"{name}: 4 files, {size:,.1f} MB, all checksums agree"
    assert texts[5] == f"from {NAMES[2]}"


def test_each_damaged_checkpoint_has_a_line_and_the_resume_is_from_a_whole_one(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = run / "checkpoints"
    flip(checkpoints / NAMES[2] / "teacher.safetensors")
    (checkpoints / NAMES[1] / "student.safetensors").unlink()
    flip(checkpoints / NAMES[1] / "train_state.pt")
    assert exit_code(run, "--json") == 3
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == 3
    said = [f"{f['verdict']} {f['text']}" for f in found["findings"] if f["name"] in ("checkpoint", "resume")]
    assert said[0].startswith(f"ok {NAMES[0]}")
    assert said[1].startswith(
        f"FAIL {NAMES[1]}: it lacks student.safetensors, train_state.pt has checksum crc32:"
    )
    assert said[2].startswith(f"FAIL {NAMES[2]}: teacher.safetensors has checksum crc32:")
    assert said[3] == f"ok from {NAMES[0]}, 2 steps again"


def test_a_run_that_cannot_be_resumed_fails(run: Path) -> None:
    for name in NAMES:
        (run / "checkpoints" / name / "meta.json").write_text("{")
    last = lines(run)[-1]
    assert last.startswith(
        "FAIL resume none of 3 checkpoints can be resumed from; restore one from a copy, or move"
    )


def test_a_checkpoint_that_is_not_finite_fails(run: Path) -> None:
    state = tiny_state()
    state.step = 9
    state.dino.center[0] = float("nan")
    save(state, run / "checkpoints" / NAMES[2])
    assert f"FAIL checkpoint {NAMES[2]}: it has NaN or infinite values" in lines(run)
    assert lines(run)[-1] == f"ok resume from {NAMES[1]}, 1 steps again"


def test_a_list_that_is_torn_is_warned_of(run: Path) -> None:
    (run / "checkpoints" / SNAPSHOT).write_bytes(b"{")
    assert "warn list Ray's list of checkpoints is torn; a resume writes it again" in lines(run)
    assert exit_code(run) == 0
    assert (run / "checkpoints" / SNAPSHOT).read_bytes() == b"{", "doctor changes nothing"


def test_a_checkpoint_that_is_not_committed_is_warned_of(run: Path) -> None:
    (run / "checkpoints" / SNAPSHOT).write_bytes(snapshot_of(NAMES[:2]))
    (found,) = [line for line in lines(run) if line.startswith("warn")]
    assert found.startswith(f"warn checkpoint {NAMES[2]}: not in Ray's list")
    assert lines(run)[-1] == f"ok resume from {NAMES[1]}"


def test_damaged_lines_of_metrics_fail(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 8}\n{"st\n{"step": 9}\n')
    assert lines(run)[0] == "FAIL metrics metrics.jsonl: 1 lines are damaged; reports leave them out"


def test_a_run_without_checkpoints_starts_at_step_0(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    assert lines(run)[-1] == "ok resume no checkpoint: the run starts at step 0"
    assert exit_code(run) == 0


def test_checkpoints_of_earlier_versions_are_said_to_have_no_checksums() -> None:
    earlier = Path(__file__).parents[1] / "end_to_end" / "earlier_run"
    assert any(
        "4 files" in line and "of an earlier version, without checksums" in line for line in lines(earlier)
    )
    assert lines(earlier)[-1] == "ok resume from step_00000009"


def test_each_trial_of_a_study_is_checked(run: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    for name in ("0000", "0001"):
        shutil.copytree(run, study / "trials" / name)
    (study / "study.json").write_text("{}")
    flip(study / "trials" / "0001" / "checkpoints" / NAMES[0] / "train_state.pt")
    found = lines(study)
    assert f"ok resume trials/0000: from {NAMES[2]}" in found
    (failed,) = [line for line in found if line.startswith("FAIL")]
    assert failed.startswith(f"FAIL checkpoint trials/0001: {NAMES[0]}: train_state.pt has checksum")
    assert exit_code(study) == 3


def test_a_folder_that_is_no_run_fails(tmp_path: Path) -> None:
    assert lines(tmp_path) == [f"FAIL run {tmp_path} has no config.yaml: pass a run directory or a study"]
    assert exit_code(tmp_path / "none") == 2


def test_who_holds_a_run_or_study_is_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_keeper, "_LOOK_SECONDS", 1.5)
    with LeaseKeeper(Directory(str(run)), tell=print):
        assert lines(run)[0].startswith(f"ok lease held by {os.uname().nodename} pid {os.getpid()} since 20")
        assert exit_code(run) == 0
    assert not any("lease" in line for line in lines(run))
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.json").write_text("{}")
    write(Directory(str(tmp_path / "study")), record("b"))
    (warning,) = lines(tmp_path / "study")
    assert warning.startswith(
        "warn lease held by host-b pid 7 since 2023-11-14 22:13:20 UTC, which does not renew"
    )


def test_a_run_takes_no_settings(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"takes no settings; leave out data.path=x"):
        exit_code(run, "data.path=x")


@pytest.mark.s3
def test_a_run_on_s3_is_checked(run: Path, bucket: str) -> None:
    there = Directory(f"s3://{bucket}/runs/tiny")
    for file in run.rglob("*"):
        if file.is_file():
            there.write(str(file.relative_to(run)), file.read_bytes())
    assert [line.split()[0] for line in lines(there.uri)] == ["ok"] * 6
    flip(run / "checkpoints" / NAMES[2] / "student.safetensors")
    there.write(
        f"checkpoints/{NAMES[2]}/student.safetensors",
        (run / "checkpoints" / NAMES[2] / "student.safetensors").read_bytes(),
    )
    found = lines(there.uri)
    assert found[4].startswith(f"FAIL checkpoint {NAMES[2]}: student.safetensors has checksum")
    assert found[5] == f"ok resume from {NAMES[1]}, 1 steps again"


def test_a_run_is_checked_without_torch(run: Path) -> None:
    code = (
        "import importlib, sys; from dinoray.jobs import doctor; "
        f"doctor.main([{str(run)!r}]); print('torch' in sys.modules)"
    )
    assert run_python(code).split()[-1] == "False"
    assert "torch" in sys.modules  # here it is
