"""What a job prints where Ray prints too: ours alone, unless it is --verbose."""

import subprocess
import sys

import pytest
from jobs_processes import foreign_lines
from paths import ROOT

PROGRAM = """
import os, subprocess, sys, warnings
from dinoray.jobs.cli.main import run_main
from dinoray.jobs.cli.quiet import quiet_ray

def main(argv):
    print("before", file=sys.stderr)
    print(quiet_ray(verbose="--verbose" in argv)["log_to_driver"], file=sys.stderr)
    os.write(2, b"native line\\n")
    subprocess.run(["sh", "-c", "echo line of a child >&2"])
    print("after", file=sys.stderr)
    warnings.warn("ours")
    raise KeyError("a bug of ours")

run_main(main)
"""


def stderr_of(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


def test_native_lines_are_dropped_and_each_of_ours_arrives_in_order() -> None:
    lines = stderr_of().splitlines()
    assert lines[:3] == ["before", "False", "after"]
    assert lines[3].endswith("UserWarning: ours")
    assert "Traceback (most recent call last):" in lines
    assert lines[-1] == "KeyError: 'a bug of ours'"
    assert not {"native line", "line of a child"} & set(lines)


def test_verbose_shows_native_lines_too() -> None:
    lines = stderr_of("--verbose").splitlines()
    assert lines[:5] == ["before", "True", "native line", "line of a child", "after"]
    assert lines[-1] == "KeyError: 'a bug of ours'"


@pytest.mark.parametrize(
    "line",
    [
        "[2026-11-27 23:28:17,594 E 11926 11926] core_worker.cc:2465: Actor with class name: 'MapWorker(MapBatches)'",
        "\x1b[33m(raylet)\x1b[0m Raylet is terminated. Termination is unexpected.",
        "\x1b[36m(MapWorker(MapBatches(EmbedActor)) pid=123)\x1b[0m text",
        "2026-11-27 23:47:02,693\tINFO worker.py:1841 -- Connecting to existing Ray cluster",
        "/venv/ray/_private/worker.py:2062: FutureWarning: Tip: In future versions of Ray",
    ],
)
def test_lines_of_ray_are_known_as_foreign(line: str) -> None:
    assert foreign_lines(f"ours\n{line}\nstep 3/9  loss 5.1 (pid of nothing)\n") == [line]
