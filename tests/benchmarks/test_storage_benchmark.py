"""benchmarks/storage.py as people start it, on few small images, and the arithmetic behind its table."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import storage
import storage_tables
from jobs_processes import run_job
from paths import ROOT

from dinoray.models.errors import ConfigError

BENCHMARKS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
TINY = ["--images", "80", "--unique", "2", "--batch", "4", "--block", "8", "--warm", "8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """One round of ours on objects and on packed images."""
    out = tmp_path_factory.mktemp("out") / "out.json"
    arguments = [
        "--rounds",
        "1",
        "--latency",
        "0",
        "0.02",
        "--only",
        "(objects|packed), ours|nothing",
        "--seconds",
        "1",
    ]
    printed = run_job("benchmarks.storage", *TINY, *arguments, "--json", str(out), env=BENCHMARKS)
    return printed, json.loads(out.read_text())["lines"]


@pytest.mark.s3
@pytest.mark.nightly
def test_each_candidate_and_latency_has_its_line(run: Any) -> None:
    lines = [(line["set"], line["candidate"], line["latency"]) for line in run[1]]
    assert lines == [(name, "ours", latency) for name in ("objects", "packed") for latency in (0, 0.02)]
    for line in run[1]:
        (row,) = line["rounds"]
        assert row["images_per_second"] > 0 < row["cpu_ms"]


@pytest.mark.s3
@pytest.mark.nightly
def test_the_table_has_a_line_each_and_what_is_kept_of_the_rate(run: Any) -> None:
    printed = run[0].splitlines()
    assert len([line for line in printed if line.startswith(("| objects | ours", "| packed | ours"))]) == 4
    assert len([line for line in printed if re.match(r"ours, (objects|packed): \d+% of its rate", line)]) == 2


def test_no_candidate_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="objects, ours"):
        storage.main(["--only", "nothing"])


def test_too_few_images_end_in_one_line_whose_remedy_is_enough() -> None:
    arguments = ["--only", "objects, ours", "--warm", "100"]
    printed = run_job("benchmarks.storage", "--images", "100", *arguments, env=BENCHMARKS, code=2)
    assert len(printed.splitlines()) == 1
    (images,) = re.findall(r"take --images=(\d+)", printed)
    assert int(0.9 * int(images)) > 100


def test_what_is_measured_begins_at_a_step_and_ends_at_a_step() -> None:
    notes: list[str] = []
    found = storage.watch(iter([4] * 10), warm=8, most=20, seconds=60, note=notes.append)
    assert found["images"] == 20 - 8
    assert notes == ["begin", "end"]


def test_a_stream_that_ends_too_soon_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="ended after 12 images"):
        storage.watch(iter([4] * 3), warm=8, most=20, seconds=60, note=lambda _: None)


def test_cpu_time_of_processes_that_have_ended_is_counted() -> None:
    before = storage.tree_cpu_seconds(os.getpid())
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert storage.tree_cpu_seconds(os.getpid()) - before > 0.25


def rounds(images_per_second: float, cpu_ms: float) -> list[Any]:
    figures = {"bytes_read_per_used": 1.0, "gets_per_image": 1.0, "proxy_cores": 0.1}
    return [{"images_per_second": images_per_second, "cpu_ms": cpu_ms, **figures}]


def test_ratios_are_against_ours_of_the_same_set_and_of_packed_for_other_formats() -> None:
    results: storage_tables.Results = {
        ("objects", "ours"): {0.0: rounds(100, 4)},
        ("objects", "theirs"): {0.0: rounds(50, 8)},
        ("packed", "ours"): {0.0: rounds(300, 1)},
        ("tars", "WebDataset"): {0.0: rounds(100, 2)},
        ("mds", "Mosaic"): {0.0: ["streaming is not installed"]},
    }
    lines = storage_tables.table(results).splitlines()[2:]
    assert [line.split(" | ")[4] for line in lines[:4]] == ["1.00", "2.00", "1.00", "3.00"]
    assert [line.split(" | ")[6] for line in lines[:4]] == ["1.00", "2.00", "1.00", "2.00"]
    assert "streaming is not installed" in lines[4]
    assert {line.count("|") for line in storage_tables.table(results).splitlines()} == {11}


@pytest.mark.parametrize(("far", "verdict"), [(85.0, "(at least 85%)"), (84.0, "(not at least 85%)")])
def test_the_share_of_the_rate_that_is_kept(far: float, verdict: str) -> None:
    results: storage_tables.Results = {("packed", "ours"): {0.0: rounds(100, 1), 0.1: rounds(far, 1)}}
    (line,) = storage_tables.kept(results)
    assert f"{far:.0f}% of its rate at 0 ms is kept at 100 ms {verdict}" in line


@pytest.mark.parametrize(
    ("line", "is_data"),
    [
        ("GET /images/objects/000001.jpg", True),
        ("GET /images/objects/000001.jpg?x-id=GetObject", True),
        ("GET /images/tars/00000.tar?X-Amz-Algorithm=AWS4&X-Amz-Expires=3600", True),
        ("GET /images?list-type=2&prefix=objects%2F", False),
        ("HEAD /images/objects/000001.jpg", False),
    ],
)
def test_listings_are_no_requests_for_data(line: str, is_data: bool) -> None:
    assert bool(re.search(storage._DATA.pattern, line)) is is_data
