"""The loop over batches: a step for each, the wait for the next, and all of it without Ray."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from paths import ROOT
from ray_files import RAY_FILES
from tiny import Batch, tiny_batch
from tiny_states import METRICS, same, tiny_state, weights

from dinoray.pipeline.training.step import train

# The loop


def test_the_loop_steps_once_per_batch_and_tells_of_each() -> None:
    state = tiny_state()
    batches = [tiny_batch(state.config, seed=seed) for seed in range(3)]
    told: list[tuple[int, int, float]] = []

    def on_step(batch: Any, metrics: dict[str, Any], wait_seconds: float) -> None:
        assert metrics.keys() == METRICS
        told.append((state.step, int(batch["position"][0]), wait_seconds))

    train(state, batches, on_step=on_step)
    assert [(step, position) for step, position, _ in told] == [(1, 0), (2, 4), (3, 8)]


def busy(seconds: float) -> float:
    """Let the clock run, and say for how long it did."""
    since = time.perf_counter()
    while time.perf_counter() - since < seconds:
        pass
    return time.perf_counter() - since


def test_the_wait_for_a_batch_is_measured_and_not_the_step() -> None:
    state = tiny_state()
    fetching: list[float] = []
    since = time.perf_counter()

    def slow_forward(*_: Any) -> None:
        busy(0.02)

    def slow_stream() -> Iterator[Batch]:
        for seed in range(3):
            fetching.append(busy(0.01 * seed))
            yield tiny_batch(state.config, seed=seed)

    def on_step(batch: Any, metrics: dict[str, Any], wait_seconds: float) -> None:
        nonlocal since
        assert fetching[-1] <= wait_seconds <= time.perf_counter() - since - 0.02
        since = time.perf_counter()

    state.student.register_forward_hook(slow_forward)
    train(state, slow_stream(), on_step=on_step)
    assert state.step == 3


def test_the_loop_of_an_empty_stream_does_nothing() -> None:
    state = tiny_state()
    before = weights(state)
    train(state, [], on_step=lambda *_: pytest.fail("there was no step"))
    assert same(weights(state), before)


# Without Ray

WITHOUT_RAY = """
import sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ImportError(f"{name} must not be imported here")

sys.meta_path.insert(0, NoRay())
try:
    import ray
except ImportError:
    pass
else:
    raise SystemExit("the finder does not work")

import gpu_step

print("gpu_step", {"botocore", "pyarrow", "cv2", "rich"} & set(sys.modules))

import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)

from dinoray.pipeline.training.state import build_state
from dinoray.pipeline.training.step import train_step
from tiny import tiny_batch, tiny_config

state = build_state(tiny_config(), num_images=40)
print("loss", float(train_step(state, tiny_batch(tiny_config()))["loss"]))
assert not any(name.partition(".")[0] == "ray" for name in sys.modules)
"""


def test_a_step_runs_and_all_but_the_ray_modules_import_where_ray_is_missing() -> None:
    """And benchmarks/gpu_step.py, before them, without storage and OpenCV."""
    root = ROOT
    files = [path for layer in ("models", "pipeline") for path in (root / layer).rglob("*.py")]
    names = {file.relative_to(root).as_posix() for file in files if file.stem != "__init__"}
    pure = sorted("dinoray." + name.removesuffix(".py").replace("/", ".") for name in names - RAY_FILES)
    assert "dinoray.pipeline.training.step" in pure
    path = os.pathsep.join(str(root / folder) for folder in ("", "tests/support", "benchmarks"))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, *pure],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"gpu_step set\(\)\nloss ", done.stdout)
