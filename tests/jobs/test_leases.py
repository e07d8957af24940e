"""Two drivers on one run or study: the second is refused before it writes, by a line that says whom to stop."""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fresh_python import run_python
from leases import record, stored, write
from no_ray import RayStarted
from tiny_run import write_run
from wrong_inputs import CONFIG, RESOURCES, TINY, Job, runner_in

import dinoray as package
from dinoray.jobs import export, pretrain, tune
from dinoray.jobs.studies.config import StudyConfig
from dinoray.jobs.studies.trial import TrialRunner
from dinoray.models.errors import ResourceError
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.lease import LostLeaseError
from dinoray.pipeline.storage.lease_keeper import Fence, LeaseKeeper
from dinoray.pipeline.study.search.tuner import TrialListener, _Stopper
from dinoray.pipeline.study.trials import OUTCOME, Trial, trial_directory, write_trial
from dinoray.pipeline.worker.driver import _reported

IMAGES = ["storage_path=WORLD/runs", "data.path=WORLD/images"]
MAINS: dict[str, tuple[Callable[[Sequence[str]], None], list[str]]] = {
    "run": (pretrain.main, []),
    "run-study": (tune.main, ["name=run-study"]),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    return runner_in(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("name", MAINS)
def test_the_second_driver_is_refused_until_the_first_has_ended(name: str, run: Job, tmp_path: Path) -> None:
    main, more = MAINS[name]
    directory = Directory(str(tmp_path / "runs" / name))
    with LeaseKeeper(directory, tell=print, job="boost-a2"):
        ending = run(main, *TINY, *IMAGES, *more)
        ending.check(
            RESOURCES,
            [
                f"{directory.uri} is in use by {os.uname().nodename} pid {os.getpid()} (job boost-a2) since",
                "; stop that one, or wait until it ends",
            ],
        )
        assert ending.output == ""
        (file,) = directory.list()
        assert file.startswith("lease-")
    with pytest.raises(RayStarted):
        run(main, *TINY, *IMAGES, *more)
    found = stored(directory)
    assert found is not None
    assert found.is_given_back


def test_a_driver_elsewhere_that_was_lost_is_waited_for_and_then_replaced(
    run: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dinoray.pipeline.storage.lease_keeper.clock", lambda: 20 * time.monotonic())
    write(Directory(str(tmp_path / "runs" / "run")), record("b"))
    with pytest.raises(RayStarted):
        run(pretrain.main, *TINY, *IMAGES)
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert (
        "/runs/run is held by host-b pid 7 since 2023-11-14 22:13:20 UTC, which may have ended: waiting"
        in first
    )
    assert second.startswith("data: 8 images")


def test_other_settings_come_before_the_driver_that_holds_the_name(run: Job, tmp_path: Path) -> None:
    with pytest.raises(RayStarted):
        run(pretrain.main, *TINY, *IMAGES)
    with LeaseKeeper(Directory(str(tmp_path / "runs" / "run")), tell=print):
        run(pretrain.main, *TINY, *IMAGES, "train.seed=3").check(
            CONFIG, ["name=run is in use", "another name="]
        )
        run(pretrain.main, *TINY, *IMAGES, "crops.local_crop_size=9").check(CONFIG, ["crops of 9 px"])


@pytest.mark.parametrize("name", MAINS)
def test_a_submitted_job_is_named_to_others(
    name: str, run: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = json.dumps({"metadata": {"job_submission_id": "boost-a3"}})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", described)
    main, more = MAINS[name]
    with pytest.raises(RayStarted):
        run(main, *TINY, *IMAGES, *more)
    found = stored(Directory(str(tmp_path / "runs" / name)))
    assert found is not None
    assert str(found.holder) == f"{os.uname().nodename} pid {os.getpid()} (job boost-a3)"


def test_a_driver_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    code = f"""
import sys
from dinoray.jobs import pretrain, tune
from dinoray.pipeline.storage.lease import InUseError
for main in (pretrain.main, tune.main):
    try:
        main({[*TINY, f"storage_path={tmp_path}", f"data.path={tmp_path}"]!r})
    except InUseError as error:
        print("refused", "torch" in sys.modules)
"""
    with LeaseKeeper(Directory(str(tmp_path / "run")), tell=print):
        assert run_python(code).split() == ["refused", "False", "refused", "False"]


def test_a_call_from_a_notebook_is_refused_too(run: Job, tmp_path: Path) -> None:
    arguments = [x.replace("WORLD", str(tmp_path)) for x in (*TINY[1:], *IMAGES)]
    recipe = TINY[0].partition("=")[2]
    with (
        LeaseKeeper(Directory(str(tmp_path / "runs" / "run")), tell=print),
        pytest.raises(ResourceError, match="is in use by"),
    ):
        package.pretrain(*arguments, recipe=recipe)
    with pytest.raises(RayStarted):
        package.pretrain(*arguments, recipe=recipe)


def test_commands_that_read_a_run_in_use_are_not_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "tiny")
    with LeaseKeeper(Directory(str(folder)), tell=print):
        export.main([str(folder)])
    assert [path.name for path in (folder / "export").iterdir() if path.is_dir()]


def test_the_report_of_a_run_that_was_taken_over_is_left_to_the_other_driver(tmp_path: Path) -> None:
    run = Directory(str(write_run(tmp_path / "tiny")))
    with pytest.raises(LostLeaseError), _reported(run):
        raise LostLeaseError("it was taken over")
    assert not run.exists("report.html")
    with pytest.raises(ValueError, match="a bug"), _reported(run):
        raise ValueError("a bug")
    assert run.exists("report.html")


def test_the_outcome_of_a_trial_is_left_to_who_took_the_study_over(tmp_path: Path) -> None:
    study, trial = Directory(str(tmp_path)), Trial(0, {}, 0, "first")
    write_trial(study, trial)

    class Attempt:
        def train(self) -> None:
            raise LostLeaseError("it was taken over")

    plan: Any = SimpleNamespace()
    runner = TrialRunner(study, cast(StudyConfig, None), [], plan, plan, Fence(study, "a"))
    with pytest.raises(LostLeaseError):
        runner._run(trial, cast(Any, Attempt))
    assert not trial_directory(study, trial).exists(OUTCOME)


def test_a_study_that_was_taken_over_stops_all_trials() -> None:
    listener = TrialListener(cast(Any, None), print)

    def check() -> None:
        raise LostLeaseError("it was taken over")

    assert not _Stopper(listener, lambda: None).stop_all()
    assert _Stopper(listener, check).stop_all()
    assert isinstance(listener.fatal, LostLeaseError)
