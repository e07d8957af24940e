"""What a run writes about itself: lines that survive a kill and a resume, what other sinks are given, and rates."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_logs import BLUE, RED, embedding, lines, log_of, log_steps, png_of

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking.json_lines import JsonLines
from dinoray.pipeline.tracking.run_log import MetricsLog
from dinoray.pipeline.tracking.sink import MetricSink
from dinoray.pipeline.worker.throughput import ThroughputMeter


def test_metrics_are_appended_as_they_come(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.log(1, {"loss": 2.5, "lr": 0.0})
    log.log(2, {"loss": 2.25, "lr": 1e-4})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.5, "lr": 0.0}, {"step": 2, "loss": 2.25, "lr": 1e-4}]
    log.close()


def test_a_resumed_run_drops_the_lines_of_the_steps_that_it_repeats(tmp_path: Path) -> None:
    first = log_of(tmp_path)
    log_steps(first, 1, 7, loss=1.0)
    first.close()
    second = log_of(tmp_path, first_step=5)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    log_steps(second, 6, 8, loss=2.0)
    second.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        *((step, 1.0) for step in range(1, 6)),
        *((step, 2.0) for step in range(6, 9)),
    ]


def test_a_run_that_starts_over_keeps_no_line_not_even_of_step_zero(tmp_path: Path) -> None:
    first = log_of(tmp_path)
    log_steps(first, 0, 3, loss=1.0)
    first.close()
    log_of(tmp_path).close()
    assert lines(tmp_path) == []


def test_the_evaluation_before_the_first_step_is_kept_by_a_resumed_run(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log_steps(log, 0, 3, loss=1.0)
    log.close()
    log_of(tmp_path, first_step=2).close()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]


def test_damaged_lines_do_not_end_each_resume(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log_steps(log, 1, 4, loss=1.0)
    log.close()
    file = tmp_path / "metrics.jsonl"
    first, second, third, *rest = file.read_bytes().splitlines()
    file.write_bytes(
        b"\n".join([first, second[:5] + b"\xff" + second[7:], b"\x00" * 9, b"5", third, *rest, b""])
    )
    log_of(tmp_path, first_step=3).close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]


def test_a_last_line_cut_off_anywhere_by_a_kill_is_no_line(tmp_path: Path) -> None:
    whole, last = '{"position": 0, "key": "a"}\n', '{"position": 1, "key": "a{b}c"}\n'
    for length in range(len(last) + 1):
        (tmp_path / "quarantine.jsonl").write_text(whole + last[:length])
        log_of(tmp_path, first_step=1, resume_position=10).close()
        positions = [p for line in lines(tmp_path, "quarantine.jsonl") for p in line["positions"]]
        assert positions == ([0, 1] if length >= len(last) - 1 else [0]), last[:length]


@settings(max_examples=25)
@given(st.lists(st.text(max_size=5), max_size=5))
def test_any_text_makes_one_line(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("lines")
    run = Directory(str(folder))
    file = JsonLines(run, "x.jsonl", keep=lambda record: True, staging=folder)
    for text in texts:
        file.append({"text": text})
    JsonLines(run, "x.jsonl", keep=lambda record: True, staging=folder)
    assert [record["text"] for record in lines(folder, "x.jsonl")] == texts


def test_numbers_that_json_lacks_are_written_as_text(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log.log(1, {"loss": math.nan, "grad_norm": math.inf, "kl": -math.inf, "lr": 1.0})
    log.close()
    strict = json.loads(
        (tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert strict == {"step": 1, "loss": "nan", "grad_norm": "inf", "kl": "-inf", "lr": 1.0}


def test_a_local_run_directory_is_made_and_nothing_else_is_left(tmp_path: Path) -> None:
    log_of(tmp_path / "runs" / "new").close()
    assert sorted(path.name for path in (tmp_path / "runs" / "new").iterdir()) == [
        "metrics.jsonl",
        "quarantine.jsonl",
        "tensorboard",
    ]


class Told(MetricSink):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        self.told.append(("log", step, dict(values)))

    def picture(self, name: str, step: int, png: bytes) -> None:
        self.told.append(("picture", name, step, png))

    def sync(self) -> None:
        self.told.append(("sync",))

    def close(self, *, failed: bool) -> None:
        self.told.append(("close", failed))


def test_other_sinks_are_given_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "crops.png").write_bytes(png_of(RED))
    sink = Told()
    log = MetricsLog(Directory(str(tmp_path)), num_images=20, others=[sink])
    log.log(1, {"loss": 2.5, "verdict": "healthy"})
    log.picture("attention", 1, png_of(BLUE))
    log.embedding(1, embedding(1.0))
    log.sync()
    log.close(failed=True)
    assert sink.told == [
        ("picture", "crops", 0, png_of(RED)),
        ("log", 1, {"loss": 2.5, "verdict": "healthy"}),
        ("picture", "attention", 1, png_of(BLUE)),
        ("sync",),
        ("close", True),
    ]


# Rates. The clock is the real one, so only relations are certain.


def busy(seconds: float) -> float:
    """Let the clock run, and say for how long it did."""
    since = time.perf_counter()
    while time.perf_counter() - since < seconds:
        pass
    return time.perf_counter() - since


def test_rates_are_per_second_of_wall_time() -> None:
    before = time.perf_counter()
    meter = ThroughputMeter()
    started = time.perf_counter()
    spent = busy(0.02)
    meter.add(30, spent, np.array([[1, 2, 3]] * 15, np.float32), np.full(15, 40, np.float32))
    meter.add(10, 0.0, np.array([[3, 2, 1]] * 5, np.float32), np.full(5, 80, np.float32))
    asked = time.perf_counter()
    rates = meter.read()
    done = time.perf_counter()
    assert 40 / (done - before) <= rates["images_per_second"] <= 40 / (asked - started)
    assert spent / (done - before) <= rates["data_wait"] <= spent / (asked - started)


def test_reading_starts_over() -> None:
    meter = ThroughputMeter()
    meter.add(1000, 1000.0, np.ones((1000, 3), np.float32), np.ones(1000, np.float32))
    assert meter.read()["data_wait"] == 1.0  # a share, whatever was told
    busy(0.001)
    assert meter.read() == {"images_per_second": 0.0, "data_wait": 0.0}


def test_a_pause_that_is_not_training_does_not_count() -> None:
    meter = ThroughputMeter()
    meter.add(1000, 0.0, np.ones((1000, 3), np.float32), np.ones(1000, np.float32))
    pause = busy(0.05)
    meter.restart()
    started = time.perf_counter()
    meter.add(10, busy(0.001), np.ones((10, 3), np.float32), np.ones(10, np.float32))
    rates = meter.read()
    assert time.perf_counter() - started < pause
    assert rates["images_per_second"] > 10 / pause


def test_a_meter_read_at_once_divides_by_no_zero() -> None:
    meter = ThroughputMeter()
    assert all(math.isfinite(value) for value in meter.read().values())
    assert all(math.isfinite(value) for value in meter.read().values())
