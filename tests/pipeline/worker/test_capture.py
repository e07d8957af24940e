"""A train worker captures the steps that go wrong, from the thread that writes, and never ends because of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NUM_IMAGES, tiny_batch, tiny_config
from tiny_run import write_images
from tiny_states import tiny_state

from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking.capture_files import CaptureFiles, read_capture
from dinoray.pipeline.training.skips import LAG
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.training.step import train
from dinoray.pipeline.worker.capture import Capture

LABELS = ("dots", "rings", "stripes", "checks")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("images")
    config = DataConfig(
        path=str(write_images(folder / "a", "train", labels=LABELS, per_label=NUM_IMAGES // 4))
    )
    return Source(config, build_manifest(config))


class Watched:
    """A run of some steps, the files that it captures, its lines, and the writes that it has put off."""

    def __init__(self, folder: Path, source: Source, *, is_first: bool = True) -> None:
        self.state, self.run = tiny_state(), Directory(str(folder / "run"))
        self.lines: list[str] = []
        self.writes: list[Callable[[], None]] = []
        self.num_sources = 0
        self.steps_done: list[int] = []
        self.logs = True

        def open_source() -> Source:
            self.num_sources += 1
            return source

        self.capture = Capture(
            self.state,
            CaptureFiles(self.run),
            source.order(0),
            source=open_source,
            last_checkpoint=lambda: 2,
            note=self.lines.append,
            write=self.writes.append if is_first else None,
            run="runs/one",
        )

    def train(self, num_steps: int, before: Callable[[TrainState], None] = lambda _: None) -> None:
        """Run steps; `before` each one."""

        def batches() -> Any:
            for step in range(num_steps):
                before(self.state)
                yield tiny_batch(tiny_config(), seed=step)

        def on_step(_: Any, metrics: dict[str, Any], __: float) -> None:
            if self.logs:
                self.state.skips.settle()
            self.capture.after_step(metrics, self.state.skips.take())
            self.steps_done.append(self.state.step)

        with self.capture.of_errors():
            train(self.state, self.capture.watch(batches()), on_step=on_step)

    def written(self, step: int) -> dict[str, Any]:
        for write in self.writes:
            write()
        self.writes.clear()
        return read_capture(self.run, step)


def spoil_step_3(state: TrainState) -> None:
    """Make a weight NaN for the third step."""
    if state.step == 2:
        with torch.no_grad():
            state.dino.student.head.last_layer.weight_v[0, 0] = float("nan")


def fail_at_step_2(state: TrainState) -> None:
    """Have the second step raise."""

    def fail(*_: Any) -> None:
        raise ArithmeticError("told so")

    if state.step == 1:
        state.dino.student.register_forward_pre_hook(fail)


def test_a_healthy_step_costs_no_write_and_no_manifest(tmp_path: Path, source: Source) -> None:
    watched = Watched(tmp_path, source)
    watched.train(3)
    assert (watched.writes, watched.num_sources, watched.lines) == ([], 0, [])
    assert watched.run.list() == []


def test_a_step_that_is_not_finite_is_captured_with_its_images_and_metrics(
    tmp_path: Path, source: Source
) -> None:
    watched = Watched(tmp_path, source)
    watched.train(3, spoil_step_3)
    assert watched.run.list() == []  # written by the thread that writes
    found = watched.written(3)
    images = source.order(0).locate(range(8, 12))[1].tolist()
    assert (found["reason"], found["positions"], found["rows"]) == ("non-finite step", [8, 12], images)
    assert found["keys"] == [source.key(image) for image in images]
    assert (found["metrics"]["loss"], found["metrics"]["lr"] > 0) == ("nan", True)
    assert (found["rank"], found["world_size"], found["seed"]) == (0, 1, 0)
    assert found["drop_path_seeds"] == [2 * 65_537]
    assert (found["checkpoint"], found["skipped"]) == ("step_00000002", 1)
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert watched.lines == [
        "step 3 is captured (non-finite step): `dinoray replay runs/one --step 3` repeats it"
    ]
    assert len(json.dumps(found)) < 4000


def test_a_step_of_which_the_host_learns_later_is_captured_with_its_own_number_and_metrics(
    tmp_path: Path, source: Source
) -> None:
    watched = Watched(tmp_path, source)
    watched.logs = False
    watched.train(2 + LAG, spoil_step_3)
    assert watched.written(3) == {}
    watched.train(1)
    found = watched.written(3)
    assert (found["positions"], found["skipped"], found["skipped_in_a_row"]) == ([8, 12], 1, 1)
    expected = watched.state.schedule.at(2)
    assert (found["metrics"]["loss"], found["metrics"]["lr"]) == ("nan", expected.lr)
    assert found["drop_path_seeds"] == [2 * 65_537]


def test_a_collapse_is_captured_at_its_step(tmp_path: Path, source: Source) -> None:
    watched = Watched(tmp_path, source)
    watched.train(2)
    watched.capture.collapse("uniform collapse", {"entropy_ratio": 0.99, "verdict": "uniform collapse"})
    found = watched.written(2)
    assert (found["reason"], found["metrics"]["entropy_ratio"]) == ("uniform collapse", 0.99)


@pytest.mark.parametrize("is_first", [True, False], ids=["rank 0", "another rank"])
def test_an_exception_of_a_step_is_captured_by_any_rank_and_raised(
    is_first: bool, tmp_path: Path, source: Source
) -> None:
    watched = Watched(tmp_path, source, is_first=is_first)
    with pytest.raises(ArithmeticError):
        watched.train(3, fail_at_step_2)
    found = watched.written(2)
    assert (found["reason"], found["error"], found["positions"]) == ("exception", "told so", [4, 8])
    assert found["traceback"][-1] == "ArithmeticError: told so"


def test_what_other_ranks_or_other_code_raise_is_not_captured(tmp_path: Path, source: Source) -> None:
    watched = Watched(tmp_path, source, is_first=False)

    def lose_peer(state: TrainState) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer")

        state.dino.student.register_forward_pre_hook(fail)

    with pytest.raises(RuntimeError, match="gloo"):
        watched.train(2, lose_peer)
    other = Watched(tmp_path, source, is_first=False)

    def lack_a_batch(state: TrainState) -> None:
        if state.step == 1:
            raise OSError("no batch")

    with pytest.raises(OSError, match="no batch"):
        other.train(2, lack_a_batch)
    assert other.steps_done == [1]
    assert watched.run.list() == other.run.list() == []


def test_a_capture_that_cannot_be_written_is_one_warning(tmp_path: Path, source: Source) -> None:
    (tmp_path / "run").write_text("no folder")
    watched = Watched(tmp_path, source)

    def spoil(state: TrainState) -> None:
        state.dino.center[0] = float("nan")

    watched.train(3, spoil)
    for write in watched.writes:
        write()
    assert watched.steps_done == [1, 2, 3]
    (line,) = watched.lines
    assert line.startswith("warning: step 1 went wrong and could not be captured: ")


def test_nothing_is_written_into_a_directory_that_is_another_drivers(tmp_path: Path, source: Source) -> None:
    watched = Watched(tmp_path, source)

    def refuse() -> None:
        raise RuntimeError("another driver has it")

    watched.capture.check = refuse
    watched.train(3, spoil_step_3)
    assert watched.written(3) == {}
    assert watched.lines == ["warning: step 3 went wrong and could not be captured: another driver has it"]
