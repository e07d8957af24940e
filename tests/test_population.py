"""A population on a Ray of its own: weak members take over from strong ones, each life a trial of its own."""

import json
from pathlib import Path

import pytest
from jobs_processes import run_job
from test_tune import arguments, images  # noqa: F401  # images is a fixture

from models.settings import ResourceError
from pipeline.storage import Directory
from pipeline.study.population import check_population
from pipeline.study.trials import read_trials


@pytest.mark.ray
@pytest.mark.slow
def test_weak_members_go_on_from_strong_ones_with_other_settings(images: Path, tmp_path: Path) -> None:  # noqa: F811
    members = 3
    shared = arguments(images, tmp_path, "population", "train.epochs=8", "tune.evaluations=4")
    output = run_job(
        "jobs.tune",
        *(a for a in shared if not a.startswith(("tune.space", "tune.first"))),
        "tune.space={loss.teacher_temp: {uniform: [0.03, 0.06]}, optim.base_lr: {log: [1e-4, 1e-2]}}",
        "tune.scheduler=pb2",
        f"tune.trials={members}",
        timeout_seconds=550,
    )
    study = Directory(str(tmp_path / "population"))
    tried = {t.trial.number: t for t in read_trials(study)}
    taken = [t for t in tried.values() if t.trial.continues is not None]
    assert taken, output  # 24 steps in four parts: somebody was the worst
    assert all(t.outcome for t in tried.values())
    for t in taken:
        donor = tried[t.trial.continues or 0]
        before = tried[t.trial.number - members]
        assert before.status == "stopped"
        assert f"went on from trial {donor.trial.name}" in before.outcome.message  # type: ignore[union-attr]
        lines = (tmp_path / "population" / "trials" / t.trial.name / "metrics.jsonl").read_text().splitlines()
        steps = [line["step"] for line in map(json.loads, lines) if "loss" in line]
        assert steps[0] == t.trial.from_step + 1  # not from the start
    last = {number % members: t for number, t in sorted(tried.items())}
    assert {t.status for t in last.values()} <= {"finished", "collapsed"}
    assert (tmp_path / "population" / "best.yaml").exists()


def test_a_population_that_does_not_fit_at_once_is_refused_with_numbers() -> None:
    with pytest.raises(ResourceError, match=r"all tune\.trials=8 at once, and 3 fit; set tune\.trials=3"):
        check_population(8, 3)
