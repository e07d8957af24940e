"""A run whose driver is killed, and which is resumed, beside the same run left alone: both end alike."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jobs_processes import losses, start_job
from safetensors.torch import load_file

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import checkpoint_name, committed_steps


def kill_and_resume(
    folder: Path,
    arguments: Callable[[str], Sequence[str]],
    run_here: Callable[..., str],
    *,
    steps: int,
    env: Mapping[str, str],
) -> None:
    """Kill the run `killed` in `folder` after its first checkpoint, resume it, and compare it with the run `whole`.

    `arguments` are those of a run by its name. Losses, and weights after the last step, must be equal bit for bit.
    """
    run, whole = Directory(str(folder / "killed")), Directory(str(folder / "whole"))
    with start_job("jobs.pretrain", *arguments("killed"), env=env) as job:
        job.wait_until(lambda: committed_steps(run))
        job.kill_driver()
    assert committed_steps(run)[-1] < steps, "killed too late to prove anything"
    assert "resuming from step" in run_here("jobs.pretrain", *arguments("killed"))
    assert losses(run.read("metrics.jsonl")) == losses(whole.read("metrics.jsonl"))
    for file in ("student.safetensors", "teacher.safetensors"):
        ours, theirs = (
            load_file(folder / name / "checkpoints" / checkpoint_name(steps) / file)
            for name in ("killed", "whole")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
