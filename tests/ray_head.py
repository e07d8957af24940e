"""A Ray head of the tests' own, with a dashboard: the smallest cluster that jobs can be submitted to."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs_processes import end_processes, processes_with
from servers import free_ports

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class RayHead:
    """A running head: its addresses, its files, and the environment that leads clients to it."""

    dashboard: str
    gcs: str
    temp_dir: Path
    env: dict[str, str]


@contextlib.contextmanager
def ray_head(env: Mapping[str, str] | None = None) -> Iterator[RayHead]:
    """A head with 4 CPUs on free ports for as long as the block lasts; `env` is what its nodes have beside ours."""
    port, dashboard, agent, grpc, metrics, client = free_ports(6)
    temp_dir = tempfile.mkdtemp(prefix="dr-", dir="/tmp")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
    variables |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"  # the job's `python`
    process = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", "--num-cpus=4", "--num-gpus=0", f"--temp-dir={temp_dir}"),
            *(f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            *(f"--dashboard-agent-grpc-port={grpc}", f"--metrics-export-port={metrics}"),
            *(f"--ray-client-server-port={client}", "--object-store-memory=300000000"),
            *("--min-worker-port=0", "--max-worker-port=0"),  # else a fixed range that may hold our ports
        ],
        env=variables | dict(env or {}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for_dashboard(address, process)
        environment = variables | {"RAY_API_SERVER_ADDRESS": address}
        yield RayHead(address, f"127.0.0.1:{port}", Path(temp_dir), environment)
    finally:
        process.kill()  # a polite stop takes many seconds, and nothing here is kept
        process.wait()
        end_processes([*processes_with(temp_dir), *processes_with(f"127.0.0.1:{port}")])
        shutil.rmtree(temp_dir, ignore_errors=True)


def wait_for_dashboard(address: str, process: "subprocess.Popen[bytes]") -> None:
    """Return once the dashboard of a head, `process`, answers at `address`."""
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, "ray start ended"
            assert time.monotonic() < deadline, "the dashboard did not come up"
            time.sleep(0.2)
