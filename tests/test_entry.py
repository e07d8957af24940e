"""How a job ends when it is asked to: SIGTERM, as `ray job stop` sends it, is taken as Ctrl-C."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from jobs_processes import ROOT, start_job

from jobs.entry import run_main, start_ray
from pipeline.resources import ResourcesConfig

JOB = """
import time
import ray
from jobs.entry import run_main, start_ray
from pipeline.resources import ResourcesConfig

def main(argv):
    start_ray(ResourcesConfig(), verbose=False)
    try:
        print("ready")
        time.sleep(600)
    finally:
        ray.shutdown()
        print("Ray is shut down")

run_main(main)
"""


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.ray
def test_sigterm_ends_a_job_and_its_ray(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(JOB)
    with start_job("waits", cwd=tmp_path) as job:
        job.wait_until(lambda: "ready" in job.output)
        assert len(job.ray_processes()) > 3
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 1
        assert job.output.splitlines() == [
            "ready",
            "Ray is shut down",
            "stopped; run it again to go on",
        ]
        job.process.poll()
        assert [p for p in job.ray_processes() if p.status() != "zombie"] == []


@pytest.mark.parametrize(
    ("place", "says"),
    [((), "run it again to go on"), (("step 120",), "the same command continues from step 120")],
)
def test_a_stopped_job_promises_to_continue_only_from_a_place_that_it_names(
    place: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(_: Sequence[str]) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(*place) from None

    monkeypatch.setattr(sys, "argv", ["job"])
    with pytest.raises(SystemExit, match=f"^stopped; {says}$"):
        run_main(main)


def test_a_job_whose_output_nobody_reads_ends_without_a_traceback() -> None:
    printing = [sys.executable, "-m", "jobs.pretrain", "--json-schema"]
    with subprocess.Popen(
        printing, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        assert job.stderr is not None
        job.stdout.close()
        assert job.stderr.read() == ""
        assert job.wait() == 1


def test_sigterm_while_ray_starts_is_not_lost_in_rays_own_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        sys.exit(signal.SIGTERM)  # what Ray's handler does

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(KeyboardInterrupt):
        start_ray(ResourcesConfig(), verbose=False)
