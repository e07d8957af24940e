"""Which checkpoints a run keeps whose saves are due by time, through a SIGKILL of its driver and a resume."""

from collections.abc import Callable
from pathlib import Path

import pytest
from jobs_processes import losses, start_job
from tiny_run import local_run

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import checkpoint_name, checkpoint_names, committed_steps
from dinoray.pipeline.tracking.records import read_records
from dinoray.pipeline.tracking.scores import best_checkpoint, scores_of

# Nightly beside tests/pipeline/worker/test_retention.py and test_agreement.py.
pytestmark = [pytest.mark.nightly, pytest.mark.ray, pytest.mark.slow]

STEPS, EVALUATED, KEPT = 160, 40, 50


def test_the_newest_the_best_and_every_kth_are_left_and_the_resumed_steps_are_the_same(
    tmp_path: Path, run_here: Callable[..., str]
) -> None:
    settings = [
        *local_run(tmp_path, "run", steps=STEPS, checkpoint_every=1),  # not in force: the clock is
        *(f"eval.every_steps={EVALUATED}", f"checkpoint.keep_every_steps={KEPT}"),
        *("checkpoint.every_minutes=0.01", "checkpoint.num_to_keep=1", "checkpoint.num_best_to_keep=1"),
    ]
    run = Directory(str(tmp_path / "run"))
    with start_job("jobs.pretrain", *settings) as job:

        def is_between_saves() -> bool:
            """The newest save was due by time, and steps have followed; others are kept already."""
            newest = max(committed_steps(run), default=0)
            return newest > KEPT and newest % 10 > 0 and (read_records(run).last_step or 0) > newest + 2

        job.wait_until(is_between_saves)
        job.kill_driver()
    newest, logged = max(committed_steps(run)), dict(losses(run.read("metrics.jsonl")))
    assert KEPT in committed_steps(run)
    run.write(
        f"checkpoints/{checkpoint_name(newest + 1)}/student.safetensors", b"of an upload that was killed"
    )
    output = run_here("jobs.pretrain", *settings)
    assert f"resuming from step {newest}" in output
    again = dict(losses(run.read("metrics.jsonl")))
    assert list(again) == list(range(1, STEPS + 1))
    assert {step: again[step] for step in logged} == logged
    assert max(logged) > newest
    best = best_checkpoint(run, read_records(run))
    assert best is not None
    scores = {step: score for step, score in scores_of(read_records(run).lines).by_step.items() if step}
    assert list(scores) == list(range(EVALUATED, STEPS + 1, EVALUATED))
    assert (best.score, best.step) == max((score, step) for step, score in scores.items())
    assert committed_steps(run) == sorted({best.step, STEPS, *range(KEPT, STEPS + 1, KEPT)})
    assert checkpoint_names(run) == list(map(checkpoint_name, committed_steps(run)))
    assert f"best checkpoint: {best}" in output.splitlines()
