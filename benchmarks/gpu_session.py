"""All that waits for a GPU, in one call of some minutes: the tests, the step of two ViTs, and its feed.

    python benchmarks/gpu_session.py --out FOLDER [--minutes 8] [--toy]

Each part is a process of its own with a time limit, so one that fails or hangs costs the others nothing. The limits add
up to 8 minutes; with fewer, the last parts get what is left. FOLDER gets a log of each part, its figures as JSON, and
session.json with what came of each. --toy: small sizes, to see on a CPU that all of it runs.

No Ray. Needs torch, timm, numpy, numba, OpenCV, Pillow, pyarrow, botocore, safetensors, simplejpeg, pydantic, PyYAML,
pytest and hypothesis.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/pipeline/training/test_on_gpu.py", "tests/models/test_compiled_loss.py")
_TOY = ("crops.global_crop_size=32", "crops.local_crop_size=16", "crops.num_local_crops=2", "head.out_dim=64")
_TOY_ARGUMENTS = {
    "gpu_step.py": ("--model", "test_vit", "--batch", "2", "--steps", "1", "--rounds", "1"),
    "gpu_feed.py": ("--model", "test_vit", "--batch", "2", "--steps", "2", "--processes", "1"),
}


class Part(NamedTuple):
    """A part of the session."""

    name: str
    seconds: float
    """Its limit."""
    command: Sequence[str]
    """After `python`."""


def parts(out: Path, *, is_toy: bool) -> list[Part]:
    """Return the parts in their order: what is to be known first comes first."""
    # conftest.py starts servers and Ray for other tests.
    tests = ("--noconftest", "-p", "no:cacheprovider", "-o", "addopts=", "-q", "-m", "gpu", *TESTS)

    def benchmark(name: str, seconds: float, file: str, *arguments: str) -> Part:
        toy = (*_TOY, *_TOY_ARGUMENTS[file]) if is_toy else ()  # the last of two values counts
        seconds *= 10 if is_toy else 1  # a CPU may be busy
        return Part(name, seconds, (f"benchmarks/{file}", *arguments, "--json", f"{out}/{name}.json", *toy))

    few = ("--steps", "10", "--rounds", "2")
    small = ("--model", "vit_small_patch16_224", "--batch", "64", "256", "--compile", "off", "on")
    base = ("--model", "vit_base_patch16_224", "--batch", "64", "128", "--compile", "on")
    return [
        Part("tests", 120, ("-m", "pytest", *tests)),
        benchmark("step_small", 150, "gpu_step.py", *small, *few),
        benchmark("step_base", 130, "gpu_step.py", *base, *few),
        benchmark("feed", 80, "gpu_feed.py"),
    ]


def run(todo: Iterable[Part], out: Path, *, seconds: float) -> dict[str, Any]:
    """Run the parts, each within its limit and all within `seconds`; return what came of each by name."""
    came, deadline = {}, time.monotonic() + seconds
    for part in todo:
        limit = min(part.seconds, deadline - time.monotonic())
        began = time.monotonic()
        came[part.name] = {"result": _run(part, out / f"{part.name}.log", limit) if limit > 0 else "no time"}
        came[part.name]["seconds"] = round(time.monotonic() - began, 1)
        print(f"== {part.name}: {came[part.name]}", flush=True)
        (out / "session.json").write_text(json.dumps(came, indent=1))
    return came


def _run(part: Part, log: Path, limit: float) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-u", *part.command],
            cwd=ROOT,
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"over {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also the processes that it started
        process.wait()
    return "done" if code == 0 else f"exit code {code}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and figures")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together")
    parser.add_argument("--toy", action="store_true", help="small sizes")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    came = run(parts(out, is_toy=options.toy), out, seconds=60 * options.minutes)
    for name in came:
        log = out / f"{name}.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        print("\n".join([f"\n== {name}", *lines[-12:]]))
    return 0 if all(one["result"] == "done" for one in came.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
