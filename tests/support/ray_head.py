"""A Ray head of the tests' own, with a dashboard: the smallest cluster that jobs can be submitted to."""

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from jobs_processes import RAY_SETTINGS, end_processes, foreign_lines, processes_with
from networks import Network
from paths import ROOT, SUPPORT
from servers import free_ports, use_aws

from dinoray.jobs.cli.main import run_main

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class RayHead:
    """A running head: its addresses, its files, and the environment of its nodes, which leads clients to it."""

    dashboard: str
    gcs: str
    temp_dir: Path
    env: dict[str, str]


@contextlib.contextmanager
def ray_head(
    env: Mapping[str, str] | None = None,
    *,
    num_cpus: int = 4,
    autoscaling: Callable[[str], Mapping[str, Any]] | None = None,
    head_env: Mapping[str, str] | None = None,
    address: str = "127.0.0.1",
) -> Iterator[RayHead]:
    """A head on free ports of an address of this machine for as long as the block lasts.

    `env` is what its nodes have beside ours, `head_env` what it has alone; `autoscaling` gives the config of Ray's
    autoscaler for the address of the head.
    """
    port, dashboard, agent, grpc, metrics, client = free_ports(6)
    temp_dir = tempfile.mkdtemp(prefix="dr-", dir="/tmp")
    gcs = f"{address}:{port}"
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
    variables |= {**RAY_SETTINGS, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"  # the job's `python`
    more = [] if address == "127.0.0.1" else [f"--node-ip-address={address}"]
    if autoscaling is not None:
        config = Path(temp_dir, "cluster.json")
        config.write_text(json.dumps(autoscaling(gcs)))
        more.append(f"--autoscaling-config={config}")
    process = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", f"--num-cpus={num_cpus}", "--num-gpus=0", *more),
            *(f"--temp-dir={temp_dir}", f"--port={port}", f"--dashboard-port={dashboard}"),
            *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"),
            *(f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}"),
            "--object-store-memory=400000000",
            "--include-log-monitor=False",  # reads every log for drivers that show none
            *("--min-worker-port=0", "--max-worker-port=0"),  # else a fixed range that may hold our ports
        ],
        env={**variables, **(env or {}), **(head_env or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_for_dashboard(url, process)
        yield RayHead(url, gcs, Path(temp_dir), {**variables, **(env or {}), "RAY_API_SERVER_ADDRESS": url})
    finally:
        process.kill()  # a polite stop takes many seconds, and nothing here is kept
        process.wait()
        # Nodes belong to the autoscaler, which leaves them when it ends, and may be starting one.
        for _ in range(2 if autoscaling else 1):
            end_processes([*processes_with(temp_dir), *processes_with(gcs)])
            time.sleep(0.5 if autoscaling else 0)
        shutil.rmtree(temp_dir, ignore_errors=True)


def _wait_for_dashboard(address: str, process: "subprocess.Popen[bytes]") -> None:
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


@dataclass(frozen=True)
class RayNode:
    """A node that has joined a cluster: its `ray start`."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def wait_until_up(self) -> None:
        """Return once its raylet listens. Before, the next node of this machine may choose the same socket, and end."""
        deadline = time.monotonic() + 300
        while not self._listens():
            assert self.process.poll() is None, f"ray start ended:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"the node does not start:\n{self.log.read_text()}"
            time.sleep(0.1)

    def lose(self) -> None:
        """End it as a lost machine ends."""
        with contextlib.suppress(psutil.Error):
            end_processes(self.processes())
        self.process.kill()
        self.process.wait()

    @property
    def node_id(self) -> str | None:
        """The id of its raylet; None before that has started."""
        return self._argument("--node_id")

    def _listens(self) -> bool:
        path = self._argument("--raylet_socket_name")
        with socket.socket(socket.AF_UNIX) as tried, contextlib.suppress(OSError):
            tried.connect(path or "")
            return True
        return False

    def _argument(self, name: str) -> str | None:
        """The value of an argument of its raylet."""
        words = [word for child in self.processes() for word in child.cmdline()]
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), None)

    def processes(self) -> list[psutil.Process]:
        """Its raylet, and the workers of that."""
        return psutil.Process(self.process.pid).children(recursive=True)


@contextlib.contextmanager
def ray_node(head: RayHead, *, num_cpus: int, network: Network | None = None) -> Iterator[RayNode]:
    """A node that joins `head`'s cluster, from another network if one is given."""
    log = head.temp_dir / f"node-{uuid.uuid4().hex[:8]}.log"
    process = subprocess.Popen(
        [
            *(network.enter if network else ()),
            *(RAY, "start", "--block", f"--address={head.gcs}", f"--num-cpus={num_cpus}", "--num-gpus=0"),
            *([f"--node-ip-address={network.there}"] if network else ()),
            *("--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"),
        ],
        env=head.env,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    node = RayNode(process, log)
    try:
        yield node
    finally:
        node.lose()


def run_job_on(head: RayHead, module: str, *arguments: str, code: int | str = 0) -> str:
    """As run_job, but the driver is this process and its Ray is `head`: no time goes into starting either.

    For what is not about processes, their signals or their exit.
    """
    printed = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        use_aws(patch, {name: value for name, value in head.env.items() if name.startswith("AWS_")})
        patch.setenv("RAY_ADDRESS", head.gcs)
        patch.setattr(sys, "argv", [module, *arguments])
        patch.setattr(ray._private.worker, "print_to_stdstream", ray._private.worker.print_to_stdstream)
        try:
            run_main(importlib.import_module(module).main)
            ended: Any = 0
        except SystemExit as end:
            ended = end.code
        finally:
            ray.shutdown()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    output = printed.getvalue()
    assert ended == code, output
    assert foreign_lines(output) == [], output
    return output


@contextlib.contextmanager
def ray_here(folder: Path, *, num_cpus: int) -> Iterator[None]:
    """A Ray of this process, which it has joined, without a dashboard.

    Its workers import by name what the files of `folder` define, and what these import.
    """
    temp_dir = tempfile.mkdtemp(prefix="dr-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", temp_dir)
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, SUPPORT, folder))))
        try:
            ray.init(num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(temp_dir, ignore_errors=True)
