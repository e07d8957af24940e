"""Runs jobs as a user does, `python -m jobs.<name>` in a process of its own, with a Ray of its own.

Each process gets a private Ray temp dir; whatever is left of that Ray at the end is killed by pid.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from paths import ROOT

PATIENCE_SECONDS = 900.0
"""How long a test waits for a job, which ends sooner on any machine: it is only there to end what hangs."""
TINY = [
    "crops.global_crop_size=32",
    "crops.local_crop_size=16",
    "crops.num_local_crops=2",
    "backbone.name=vit_tiny_patch16_224",
    "backbone.drop_path_rate=0.1",
    "backbone.kwargs={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    "head.out_dim=64",
    "head.hidden_dim=32",
    "head.bottleneck_dim=16",
    "train.global_batch_size=8",
    "log.every_steps=1",
    "optim.freeze_last_layer_epochs=1",
    "loss.warmup_teacher_temp=0.02",
    "loss.warmup_teacher_temp_epochs=3",
    "resources.augment_actors=1",
    "recipe=demo",
]
"""Overrides that make a run a matter of seconds and still use every part of it."""


_FOREIGN = re.compile(
    r"\[\d{4}-\d\d-\d\d [\d:,]+ [A-Z] \d+ \d+\]"  # Ray's C++ core
    r"|\d{4}-\d\d-\d\d [\d:,]+\s+(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b"  # Python's loggers
    r"|\((raylet|autoscaler|.*\bpid=\d+)[^)]*\)"  # other processes of Ray
    r"|\S+:\d+: \w*Warning: "  # Python's warnings
    r"|Traceback \(most recent call last\)"
    r"|Running Dataset|.*ActorPoolMapOperator|.*TaskPoolMapOperator|.*Tip: "  # progress and advice
)
"""How lines begin that a job prints only with --verbose; colours are left out."""
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


def foreign_lines(output: str) -> list[str]:
    """The lines of a job's output that are none of ours."""
    return [line for line in output.splitlines() if _FOREIGN.match(_COLOUR.sub("", line).lstrip("\r "))]


RAY_SETTINGS = {
    # Set before Ray is first used: a process keeps the mode that it finds then, and one that asks others for a token is
    # called by none of a Ray without them, which then takes its actors for abandoned.
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",  # else workers starve beside tests that run at the same time
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a run ends the sooner
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process for each run, for nodes that have a notice
}
"""Environment of every Ray of the tests, and of this process."""


class Job:
    """A running job: its process and what it has printed so far (stdout and stderr together)."""

    def __init__(self, process: "subprocess.Popen[str]", ray_temp_dir: str) -> None:
        self.process, self._ray_temp_dir = process, ray_temp_dir
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    def wait(self, timeout_seconds: float = PATIENCE_SECONDS) -> int:
        """The exit code; the output is complete then, and all of it is ours unless the job is `--verbose`.

        A job that ends with 1 may show the traceback of a bug.
        """
        code = self.process.wait(timeout_seconds)
        self._reader.join(10)
        if code != 1 and "--verbose" not in self.process.args:  # type: ignore[operator]
            assert foreign_lines(self.output) == [], self.output
        return code

    def wait_until(self, condition: Callable[[], Any], timeout_seconds: float = PATIENCE_SECONDS) -> Any:
        """The first true value of `condition`; fails when the job ends or the time is over before that."""
        deadline = time.monotonic() + timeout_seconds
        while not (value := condition()):
            assert self.process.poll() is None, f"the job ended first:\n{self.output}"
            assert time.monotonic() < deadline, f"timed out:\n{self.output}"
            time.sleep(0.05)
        return value

    def ray_processes(self) -> list[psutil.Process]:
        """Processes of this job's own Ray."""
        return processes_with(self._ray_temp_dir)

    def kill_driver(self) -> None:
        """SIGKILL the driver, as a lost head node does, and wait until its Ray is gone too."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        end_processes([p for p in self.ray_processes() if p.pid != self.process.pid])


@contextlib.contextmanager
def start_job(
    module: str, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> Iterator[Job]:
    """`python -m module arguments...`; on leaving, everything that it started is ended."""
    ray_temp_dir = tempfile.mkdtemp(prefix="dr-", dir="/tmp")  # short: it holds unix sockets
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_"))}
    variables |= {
        "RAY_TMPDIR": ray_temp_dir,
        **RAY_SETTINGS,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(ROOT),
        **(env or {}),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    job = Job(process, ray_temp_dir)
    try:
        yield job
    finally:
        process.kill()
        process.wait()
        end_processes(job.ray_processes())
        shutil.rmtree(ray_temp_dir, ignore_errors=True)


def run_job(
    module: str,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    code: int = 0,
) -> str:
    """Run a job to its end, check its exit code, and return what it printed."""
    with start_job(module, *arguments, env=env, cwd=cwd) as job:
        assert job.wait() == code, job.output
        return job.output


def wait_until(condition: Callable[[], object], timeout_seconds: float = 300) -> None:
    """Return once `condition` is true; fails when the time is over before that."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


class Resume(NamedTuple):
    """What the line of a resumed run says."""

    why: str
    after_step: int
    from_step: int
    seconds: int
    steps_repeated: int


def resumes(output: str) -> list[Resume]:
    """The resumes that a run has told of, in order."""
    line = r"^(.+) after step (\d+): resuming from step (\d+) after (\d+) s, (\d+) steps repeated$"
    return [Resume(why, *map(int, numbers)) for why, *numbers in re.findall(line, output, re.M)]


def losses(metrics: bytes) -> list[tuple[int, float]]:
    """(step, loss) of every training line of a metrics.jsonl, in file order."""
    records = [json.loads(line) for line in metrics.splitlines()]
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


def processes_with(text: str) -> list[psutil.Process]:
    """Other processes that have `text` in their command line or as their RAY_TMPDIR."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            known_by = [*process.cmdline(), process.environ().get("RAY_TMPDIR", "")]
            if process.pid != os.getpid() and any(text in part for part in known_by):
                found.append(process)
    return found


def end_processes(processes: list[psutil.Process]) -> None:
    """Kill by pid, and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
