"""The report's sections on what feeds a run, on what it could not use, on its recipe, and on what it ran on."""

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_runs import GPU, HEAD, Page, fed_record, fed_run, jsonl, make_run, step_record

from dinoray.jobs.cli.config import load_config
from dinoray.jobs.cli.recipes import RECIPES
from dinoray.jobs.runs.run_files import note_hardware, recipe_changes
from dinoray.jobs.studies.config import StudyConfig, load
from dinoray.pipeline.reporting.plots import Curve, Span, chart, downsample
from dinoray.pipeline.reporting.run_report import build_report
from dinoray.pipeline.tracking.records import Records, Series


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(build_report(fed_run(tmp_path_factory.mktemp("fed"))))


# What feeds the run


def test_the_page_shows_what_feeds_the_train_workers(fed: Page) -> None:
    section = fed.text.split("Throughput")[1].split("Attention maps")[0]
    for words in (
        *(
            "The x-axis shows hours since the first log line.",
            "Images per second",
            "Time spent waiting for data",
        ),
        *("Running nodes", "without GPUs", "with GPUs", "head", "Augment actors", "requested", "running"),
        *("CPU time per image (ms)", "fetch", "decode", "crop", "Cumulative cost (dollars)"),
        "Gaps in the curves: the run was stopped or evaluating.",
    ):
        assert words in section, words
    # 390 steps of 30 s and an hour down; 4.2 dollars an hour
    assert "wall time4.2 hsince the first log line, including 61 min of gaps" in fed.text
    assert "cost$18.20nodes, during the run" in fed.text


def test_curves_over_time_are_broken_where_the_run_was_down(tmp_path: Path) -> None:
    def parts(pause: float) -> int:
        """Of which the curve of images/s is made."""
        records = [fed_record(s, s * 30.0 + pause * (s > 100)) for s in range(1, 201)]
        text = build_report(make_run(tmp_path, metrics_dot_jsonl=jsonl(*records)))
        svg = text.split("Images per second")[1].split("</svg>")[0]
        (curve,) = [p for p in svg.split("<path")[1:] if "var(--series-1)" in p and "clip-path" in p]
        return curve.split('d="')[1].split('"')[0].count("M ")

    assert (parts(0), parts(250), parts(3600)) == (1, 1, 2)


def test_lines_without_times_are_drawn_over_steps(tmp_path: Path) -> None:
    records = [step_record(step) for step in range(1, 9)]
    text = Page(build_report(make_run(tmp_path, metrics_dot_jsonl=jsonl(*records)))).text
    assert "The x-axis shows steps: this run's log lines have no timestamps." in text
    assert "Images per second" in text
    for absent in ("wall time", "cost", "Running nodes", "Augment actors", "Cumulative cost", "CPU time"):
        assert absent not in text


def test_a_short_run_without_a_stop_has_minutes_and_no_break(tmp_path: Path) -> None:
    records = [fed_record(step, step * 1.5) for step in range(1, 201)]
    text = Page(build_report(make_run(tmp_path, metrics_dot_jsonl=jsonl(*records)))).text
    assert "The x-axis shows minutes since the first log line." in text
    assert "Gaps" not in text
    assert "wall time5 minsince the first log linecost" in text


def test_a_kind_of_node_that_never_was_is_no_curve(tmp_path: Path) -> None:
    records = [fed_record(step, step) | {"nodes_gpu": 0, "nodes_cpu": 0} for step in range(1, 9)]
    text = Page(build_report(make_run(tmp_path, metrics_dot_jsonl=jsonl(*records)))).text
    assert "Running nodes" in text
    assert "GPUs" not in text


def test_a_series_stands_over_time_in_its_order() -> None:
    lines = [
        {"step": 1, "time": 30.0, "a": 1},
        {"step": 2, "time": 10.0, "a": 2},
        {"step": 3, "a": 3},
        {"step": 4, "time": "nan", "a": 4},
        {"step": 5, "time": 20.0, "a": "inf"},
    ]
    places, values = Records(jsonl(*lines)).series("a", over="time")
    assert places.tolist() == [10, 20, 30]
    np.testing.assert_array_equal(values, [2, np.nan, 1])


def test_a_break_stays_where_points_are_merged() -> None:
    steps = np.array([*range(50), np.nan, *range(1000, 1050)])
    values = np.where(np.isnan(steps), np.nan, np.nan_to_num(steps))
    series, lows, highs = downsample(Series(steps, values), 10)
    (gap,) = np.flatnonzero(np.isnan(series.steps))
    assert math.isnan(series.values[gap])
    assert highs[:gap].max() == 49
    assert lows[gap + 1 :].min() == 1000
    assert len(series.steps) <= 11


def test_counts_change_at_once() -> None:
    values = np.repeat([1.0, 3.0], 1000)
    svg = chart([Curve("nodes", Series(np.arange(2000.0), values))], counts=True, span=Span(0, 2000, "min"))
    (line,) = [path for path in svg.split("<path")[1:] if "stroke-width: 1.5" in path and "clip-path" in path]
    points = [
        tuple(map(float, p.split()[1:])) for p in line.split('d="')[1].split('"')[0].strip().splitlines()
    ]
    assert len(points) <= 7  # two levels and the step between them
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in itertools.pairwise(points))
    assert ">min</text>" in svg


# Bad images


def test_bad_images_are_summed_up_by_kind(fed: Page) -> None:
    section = fed.text.split("Bad images")[1].split("Scores")[0]
    assert (
        "Images that could not be used: 100. They were replaced by other images 100 times (0.39 % of 25,600 images "
        "seen, 39% of the limit data.max_bad_fraction=0.01)." in section
    )
    assert "damaged or cut off JPEG400.16 %train/2019/archive-of-summer/IMG_000000.jpg" in section
    assert "missing200.078 %train/2019/archive-of-summer/IMG_000002.jpg" in section
    assert "empty200.078 %" in section
    assert "too many bytes200.078 %" in section
    assert "Rows of quarantine.jsonl: first 20 of 100" in section
    assert len(fed.all("details")) == 4


# Recipe, versions, hardware


def test_the_page_says_what_is_not_the_recipes(fed: Page) -> None:
    section = fed.text.split("Settings")[-1].split("Versions and hardware")[0]
    assert "settingrecipe photos_smallthis run" in section
    assert "data.pathnot sets3://photos/train" in section
    assert "train.epochs2040" in section
    assert "crops.blur_sigma[0.1, 0.9][0.1, 2.0]" in section
    assert "head.out_dim=1024: 4000 images" in section


@pytest.mark.parametrize(
    "environment",
    [
        {"recipe": "demo"},
        {"recipe": {"name": "gone"}},
        {"recipe": {"changed": [1]}},
        {"recipe": {"changed": {"a": 3}}, "hardware": {"nodes": 1}, "packages": [], "automatic": {}},
        {"hardware": ["x"]},
    ],
)
def test_a_run_of_another_version_has_a_page(tmp_path: Path, environment: dict[str, Any]) -> None:
    page = Page(build_report(make_run(tmp_path, environment_dot_json=environment)))
    assert "environment.json" in page.text
    assert "this run" not in page.text


def test_changes_are_what_was_asked_for() -> None:
    changes = recipe_changes(load_config("demo", None, ["train.epochs=2", "crops.hue=0.1", "name=x"]))
    assert changes == {
        "crops.hue": {"recipe": 0.5, "run": 0.1},
        "train.epochs": {"recipe": 24.0, "run": 2.0},
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_as_it_is_changes_nothing_but_the_path_that_it_leaves_open(recipe: str) -> None:
    is_open = "path" not in RECIPES[recipe]().get("data", {})
    overrides = ["data.path=s3://b/x"] if is_open else []
    expected = {"data.path": {"recipe": None, "run": "s3://b/x"}} if is_open else {}
    assert recipe_changes(load_config(recipe, None, overrides)) == expected
    assert recipe_changes(load(StudyConfig, recipe, None, overrides, name_suffix="-study")) == expected


def test_a_recipe_that_is_followed_is_said_to_be(tmp_path: Path) -> None:
    run = make_run(tmp_path, environment_dot_json={"recipe": {"name": "demo", "changed": {}}})
    assert "No setting differs from the recipe demo." in Page(build_report(run)).text


def test_the_page_says_what_the_run_ran_on(fed: Page) -> None:
    section = fed.text.split("Versions and hardware")[1]
    for words in (
        *("commit0123456789abcdef", "Python3.11.1", "driver's processorXeon", "PyTorch's CUDA version12.8"),
        *("ray2.60.0", "torch2.10.0", "numbanot installed"),
        *("nodeskindCPUsGPUsGPU modelGiB", "1head4016", "2gpu81A10G64"),
    ):
        assert words in section, words


def test_hardware_is_the_most_that_was_up_at_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, environment_dot_json={"python": "3.11.1"})
    dead = {"Alive": False, "Resources": GPU}
    for resources in ([HEAD], [HEAD, GPU, GPU], [HEAD, GPU]):
        note_hardware(run, [dead, *({"Alive": True, "Resources": one} for one in resources)])
    about = json.loads(run.read("environment.json"))
    assert about["python"] == "3.11.1"
    assert [(row["nodes"], row["kind"], row["GPU model"], row["GiB"]) for row in about["hardware"]] == [
        (1, "head", "", 16),
        (2, "gpu", "A10G", 64),
    ]


def test_a_local_ray_of_more_logical_cpus_is_reported_with_the_cpus_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"Alive": True, "Resources": HEAD | {"CPU": 64.0}}, {"Alive": True, "Resources": GPU}]
    for address, cpus in ((None, os.cpu_count()), ("ray://head:10001", 64)):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        if address:
            monkeypatch.setenv("RAY_ADDRESS", address)
        run = make_run(
            tmp_path / str(cpus), environment_dot_json={"python": "3.11.1", "cpus": os.cpu_count()}
        )
        note_hardware(run, nodes)
        text = Page(build_report(run)).text
        assert f"1head{cpus}0" in text
        assert f"driver's CPUs{os.cpu_count()}" in text


# Size


def test_a_page_does_not_grow_with_what_a_run_has_written(tmp_path: Path) -> None:
    lines = [fed_record(step, step * 5.0) for step in range(6000)]
    bad = [
        {"position": p, "status": "corrupt", "key": f"{p}.jpg", "reason": "0 bytes"} for p in range(60_000)
    ]
    run = make_run(tmp_path, metrics_dot_jsonl=jsonl(*lines), quarantine_dot_jsonl=jsonl(*bad))
    text = build_report(run)
    assert len(text) < 600_000
    assert "Images that could not be used: 60,000" in text
    assert "Only the first 50,000 are grouped by kind." in text
