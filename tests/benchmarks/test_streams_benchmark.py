"""benchmarks/streams.py as people start it, on few tiny blocks, and the arithmetic behind its table."""

import json
from pathlib import Path

import pytest
import streams
from jobs_processes import run_job
from paths import ROOT

from dinoray.models.errors import ConfigError

BENCHMARKS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
SMALL = ["--consumers", "2", "--actors", "2", "--block-images", "4", "--rounds", "1", "--unique", "8"]


@pytest.mark.ray
@pytest.mark.nightly
def test_each_number_of_streams_is_measured_side_by_side(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = [*SMALL, "--streams", "1", "2", "--images", "240", "--json", str(out)]
    printed = run_job("benchmarks.streams", *arguments, env=BENCHMARKS)
    one, two = json.loads(out.read_text())["lines"]
    assert (one["streams"], two["streams"]) == (1, 2)
    for line in (one, two):
        assert 0 < line["coordinators_cpu_ms"] < line["session_cpu_ms"]
        assert line["images_per_second"] == pytest.approx(4 * line["blocks_per_second"])
        assert 0 < line["coordinator_cores"] < 4
        assert 0 <= line["waited"] <= 1
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| streams", "| ---", "| 1", "| 2"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--streams", "3", "--images", "240"], "data.streams=3 must be at most resources.train_workers=2"),
        (["--streams", "2", "--images", "64"], "take --images=96"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_remedy(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        streams.main([*SMALL, *arguments])


def test_figures_of_images_become_those_of_blocks_and_of_one_coordinator() -> None:
    measured = {
        "images_per_second": 800.0,
        "cpu_ms_by_process": {"coordinator": 2.0, "actor": 5.0},
        "cpu_ms": 7.5,
        "waited": 0.5,
    }
    found = streams.round_of(measured, 2, images_per_block=10)
    # 80 blocks of 20 ms a second are 1.6 cores, 0.8 of each coordinator.
    assert found == {
        "images_per_second": 800,
        "blocks_per_second": 80,
        "coordinators_cpu_ms": 20,
        "coordinator_cores": pytest.approx(0.8),
        "session_cpu_ms": 75,
        "waited": 0.5,
    }
