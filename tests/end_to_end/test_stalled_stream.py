"""A run whose augment actors get on no more says so, with numbers, and ends in the end."""

import re
import signal
from pathlib import Path

import pytest
from jobs_processes import end_processes, start_job
from tiny_run import local_run

from dinoray.models.errors import ResourceError


@pytest.mark.nightly  # for the minute of waiting
def test_a_run_whose_augment_actors_are_stopped_says_so_and_ends(tmp_path: Path) -> None:
    arguments = [
        *local_run(tmp_path, "stalled", steps=2000, checkpoint_every=50),
        *("eval.val_path=null", "data.stall_seconds=8", "resources.wait_for_nodes_minutes=0.4"),
        "storage.give_up_after_seconds=5",
    ]
    with start_job("jobs.pretrain", *arguments) as job:
        job.wait_until(lambda: "step 1/" in job.output)
        actors = [
            process for process in job.ray_processes() if "MultiCropActor" in " ".join(process.cmdline())
        ]
        assert actors
        for actor in actors:
            actor.send_signal(signal.SIGSTOP)
        try:
            assert job.wait() == ResourceError.exit_code
        finally:
            end_processes(actors)
    assert re.search(
        r"warning: no images for \d+ s at step \d+: 1 augment actors work at \d+ blocks", job.output
    )
    last = job.output.strip().splitlines()[-1]
    assert last.startswith("error: resources.wait_for_nodes_minutes=0.4: no images have come for ")
