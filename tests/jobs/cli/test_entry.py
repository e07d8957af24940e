"""How a job ends when it is asked to: SIGTERM, as `ray job stop` sends it, is taken as Ctrl-C."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from jobs_processes import start_job
from paths import ROOT
from ray_head import RayHead
from servers import free_ports

from dinoray.jobs.cli.main import join_ray, run_main, start_ray
from dinoray.models.errors import ResourceError
from dinoray.pipeline.cluster.resources import ResourcesConfig

JOB = """
import time
import ray
from dinoray.jobs.cli.main import run_main, start_ray
from dinoray.pipeline.cluster.resources import ResourcesConfig

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
            "stopped; to go on, run the same command again",
        ]
        job.process.poll()
        assert [p for p in job.ray_processes() if p.status() != "zombie"] == []


@pytest.mark.parametrize(
    ("place", "says"),
    [((), "to go on, run the same command again"), (("step 120",), "the same command resumes from step 120")],
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


@pytest.mark.parametrize(
    ("folder", "rule"),
    [
        ("/tmp/" + "x" * 100, "is too long for Ray's sockets: set a shorter one, e.g. RAY_TMPDIR=/tmp"),
        (__file__, "or set RAY_TMPDIR to another folder"),
    ],
)
def test_a_folder_that_ray_cannot_use_is_named(
    folder: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", folder)
    with pytest.raises(ResourceError) as raised:
        start_ray(ResourcesConfig(), verbose=False)
    assert str(raised.value).startswith("a local Ray does not start: ")
    assert str(raised.value).endswith(rule)
    assert folder in str(raised.value)


def test_a_ray_that_does_not_start_in_time_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(ResourceError) as raised:
        start_ray(ResourcesConfig(), verbose=False)
    assert str(raised.value).endswith("wait until this machine is less busy, then run the same command again")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:{port}", "nothing answers there"),
        ("ray://127.0.0.1:10001", "it is not the HOST:PORT of a Ray head"),
        ("nowhere", "it is not the HOST:PORT of a Ray head"),
    ],
)
def test_an_address_without_a_head_is_refused_at_once(
    address: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = address.format(port=free_ports(1)[0])
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ResourceError, match=f"^RAY_ADDRESS={address} cannot be joined: {why}; start a head"):
        start_ray(ResourcesConfig(), verbose=False)


@pytest.mark.ray
def test_a_watch_ends_with_its_ray_though_the_process_joins_one_again(
    cluster: RayHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.gcs)
    before = set(threading.enumerate())
    join_ray(1, verbose=False)
    (watch,) = (
        thread for thread in threading.enumerate() if thread.name == "ray-watch" and thread not in before
    )
    assert watch.is_alive()
    ray.shutdown()
    join_ray(1, verbose=False)
    try:
        watch.join(120)
        assert not watch.is_alive()
    finally:
        ray.shutdown()
