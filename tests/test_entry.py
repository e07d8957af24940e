"""How a job ends when it is asked to: SIGTERM, as `ray job stop` sends it, is taken as Ctrl-C."""

import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from jobs_processes import start_job

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
            "stopped; the same command continues from the last checkpoint",
        ]
        job.process.poll()
        assert [p for p in job.ray_processes() if p.status() != "zombie"] == []


@pytest.mark.parametrize(
    ("place", "says"), [((), "from the last checkpoint"), (("step 120",), "from step 120")]
)
def test_a_job_may_name_the_place_that_it_continues_from(
    place: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(_: Sequence[str]) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(*place) from None

    monkeypatch.setattr(sys, "argv", ["job"])
    with pytest.raises(SystemExit, match=f"^stopped; the same command continues {says}$"):
        run_main(main)


def test_sigterm_while_ray_starts_is_not_lost_in_rays_own_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        sys.exit(signal.SIGTERM)  # what Ray's handler does

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(KeyboardInterrupt):
        start_ray(ResourcesConfig(), verbose=False)
