"""Ray heads as a cluster has them, with a dashboard, on ports and in a folder of their own."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from jobs_processes import end_processes, processes_with
from servers import free_ports

RAY = str(Path(sys.executable).with_name("ray"))


@contextlib.contextmanager
def ray_head(*, num_cpus: int) -> Iterator[dict[str, str]]:
    """A head without GPUs; yields the environment that leads clients and drivers to it."""
    port, dashboard, agent, grpc, metrics, client = free_ports(6)
    temp_dir = tempfile.mkdtemp(prefix="dr-", dir="/tmp")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
    env |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # the job's `python`
    process = subprocess.Popen(
        [
            *(
                RAY,
                "start",
                "--head",
                "--block",
                f"--num-cpus={num_cpus}",
                "--num-gpus=0",
                f"--temp-dir={temp_dir}",
            ),
            *(f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            *(f"--dashboard-agent-grpc-port={grpc}", f"--metrics-export-port={metrics}"),
            *(f"--ray-client-server-port={client}", "--object-store-memory=300000000"),
            *("--min-worker-port=0", "--max-worker-port=0"),  # else a fixed range that may hold our ports
        ],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{address}/api/version", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, "ray start ended"
                assert time.monotonic() < deadline, "the dashboard did not come up"
                time.sleep(0.2)
        yield env | {"RAY_API_SERVER_ADDRESS": address, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        end_processes([*processes_with(temp_dir), *processes_with(f"127.0.0.1:{port}")])
        shutil.rmtree(temp_dir, ignore_errors=True)
