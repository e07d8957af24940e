"""`pretrain --synthetic` and `--no-train`: two rates, the bottleneck in words, and nothing left behind."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jobs_processes import TINY, run_job
from no_ray import RayStarted, forbid_ray
from tiny_run import write_images

from dinoray.jobs import pretrain
from dinoray.jobs.runs import head_space
from dinoray.jobs.runs.head_space import Taken, describe_bottleneck, take
from dinoray.models.errors import ResourceError


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    images = write_images(tmp_path / "images", "train", labels=("dots", "rings"), per_label=8)
    return [*TINY, f"data.path={images}", f"storage_path={tmp_path / 'runs'}", "resources.train_workers=1"]


def test_the_step_alone_needs_no_ray_and_leaves_no_run(
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forbid_ray(monkeypatch)
    monkeypatch.setattr(head_space, "_SECONDS", 0.01)
    pretrain.main([*settings, "--synthetic"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("step alone: ")
    assert "images/s on one CPU with 8 images a step" in line
    assert not (tmp_path / "runs").exists()


def test_a_gpu_that_is_asked_for_and_not_there_ends_in_one_line(settings: list[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ResourceError, match=r"no GPU to measure the step on; set resources\.use_gpu=false"):
        pretrain.main([*settings, "--synthetic", "resources.use_gpu=true"])


def test_the_stream_alone_starts_ray_and_measures_no_step(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forbid_ray(monkeypatch)
    with pytest.raises(RayStarted):
        pretrain.main([*settings, "--no-train"])
    assert "step" not in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.nightly
def test_both_name_the_bottleneck(settings: list[str], tmp_path: Path) -> None:
    printed = run_job("jobs.pretrain", *settings, "train.epochs=2000", "--synthetic", "--no-train")
    step, stream, verdict = [line for line in printed.splitlines() if not line.startswith("measuring")][-3:]
    assert step.startswith("step alone: ")
    assert stream.startswith("stream alone: ")
    assert stream.endswith(" images/s to 1 train workers")
    assert verdict.startswith("bottleneck: the ")
    assert not (tmp_path / "runs").exists()


def test_the_slower_one_is_the_bottleneck() -> None:
    slow_stream = "bottleneck: the stream; with free data it would be 3,000 images/s, 2.5 times as many"
    assert describe_bottleneck(3000.0, 1200.0) == slow_stream
    slow_step = "bottleneck: the training step; the stream could feed 1.5 times as many images"
    assert describe_bottleneck(2000.0, 3000.0) == slow_step


class Stream:
    """Batches of 10 images by a clock of its own: before each, some seconds pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
        self._seconds, self.now, self.taken = seconds, 100.0, 0
        monkeypatch.setattr(head_space, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def __iter__(self) -> Iterator[dict[str, range]]:
        for seconds in self._seconds:
            self.now += seconds
            self.taken += 1
            yield {"position": range(10)}


def test_a_stream_is_counted_after_its_start_and_its_first_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start of 50 s, ten batches at once, then one a second; of 8 seconds the last 6 count."""
    stream = Stream(monkeypatch, 50, *[0.0] * 10, *[1.0] * 20)
    taken = take(stream, 8.0)
    assert taken.images / taken.seconds == 10
    assert stream.now == 158


@pytest.mark.parametrize(
    ("seconds", "expected"), [((), Taken(0, 1.0)), ((5,), Taken(0, 1.0)), ((5, 0.5, 0.5), Taken(20, 1.0))]
)
def test_a_stream_that_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], expected: Taken
) -> None:
    assert take(Stream(monkeypatch, *seconds), 8.0) == expected
