"""The report's sections on what feeds a run, on what it could not use, on its recipe, and on what it ran on."""

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_runs import CONFIG, Page, jsonl, make_run, png, step_record

from dinoray.jobs.cli.config import load_config
from dinoray.jobs.cli.recipes import RECIPES
from dinoray.jobs.runs.run_files import note_hardware, recipe_changes
from dinoray.jobs.studies.config import StudyConfig, load
from dinoray.pipeline.cluster.nodes import group_identical_nodes
from dinoray.pipeline.data.decode import BadImage, decode
from dinoray.pipeline.reporting.bad_images import Share, kind_of, near_limit_warning
from dinoray.pipeline.reporting.plots import Curve, Span, chart, downsample
from dinoray.pipeline.reporting.run_report import build_report
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking.records import Records, Series, read_head

BEGIN = 1_700_000_000.0
HEAD = {"CPU": 4.0, "memory": 12 * 2.0**30, "object_store_memory": 4 * 2.0**30, "node:__internal_head__": 1.0}
GPU = {"CPU": 8.0, "GPU": 1.0, "memory": 64 * 2.0**30, "accelerator_type:A10G": 1.0}


def fed_record(step: int, seconds: float, **changes: Any) -> dict[str, Any]:
    """A line as a run on a cluster writes it: nodes come, the pool follows, waiting ends."""
    cpu_nodes = min(3, step // 60)
    return step_record(
        step,
        time=BEGIN + seconds,
        images_per_second=300.0 + 250 * cpu_nodes + 20 * math.sin(step),
        data_wait=max(0.004, 0.6 - 0.2 * cpu_nodes),
        nodes_head=1,
        nodes_cpu=cpu_nodes,
        nodes_gpu=1,
        augment_actors=4 + 8 * cpu_nodes,
        augment_target=4 + 8 * min(3, (step + 20) // 60),
        dollars=round(seconds / 3600 * 4.2, 4),
        fetch_cpu_ms=0.6,
        decode_cpu_ms=5.2 + 0.2 * math.sin(step / 7),
        crop_cpu_ms=7.9 + 0.2 * math.cos(step / 5),
        bad_images=step // 4,
        **changes,
    )


def fed_run(folder: Path) -> Directory:
    """Four hours and a half, of which the run was down for one, with every kind of file that it leaves."""
    health = {
        "entropy_ratio": 0.4,
        "mutual_information": 1.5,
        "feature_std": 0.05,
        "verdict": "healthy",
        "prototypes_used": 0.8,
        "commonest_prototype": 0.02,
        "rankme": 40.0,
    }
    lines: list[dict[str, Any]] = []
    for step in range(10, 401, 2):
        lines.append(fed_record(step, step * 30.0 + (3600 if step > 200 else 0), **health))
        if step % 100 == 0:
            knn = 0.1 + step / 900
            lines.append({"step": step, "knn_10": knn - 0.01, "knn_20": knn, "majority": 0.08})
    reasons = [
        ("corrupt", "damaged or cut off JPEG: OpenCV finds no whole picture"),
        ("corrupt", "damaged or cut off JPEG: OpenCV finds no whole picture"),
        ("missing", "s3://photos/train/{}: there is no such object (404)"),
        ("corrupt", "0 bytes"),
        ("too_large", "99887{}66 bytes, more than data.max_object_bytes=67108864"),
    ]
    bad = []
    for i in range(100):
        status, reason = reasons[i % len(reasons)]
        key = f"train/2019/archive-of-summer/IMG_{i:06d}.jpg"
        bad.append({"position": 40 * i, "status": status, "key": key, "reason": reason.format(i)})
    config = CONFIG | {
        "name": "photos-vit-s",
        "recipe": "photos_small",
        "data": {"path": "s3://photos/train", "max_bad_fraction": 0.01},
        "train": {"epochs": 40.0, "global_batch_size": 64, "precision": "bf16"},
    }
    changed = {
        "data.path": {"recipe": None, "run": "s3://photos/train"},
        "train.epochs": {"recipe": 20.0, "run": 40.0},
        "crops.blur_sigma": {"recipe": [0.1, 0.9], "run": [0.1, 2.0]},
    }
    environment = {
        "python": "3.11.1",
        "platform": "Linux-6.1-x86_64",
        "processor": "Xeon",
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "cuda": "12.8",
        "packages": {"dinoray": "0.1.0", "ray": "2.60.0", "torch": "2.10.0", "numba": None},
        "automatic": ["head.out_dim=1024: 4000 images"],
        "recipe": {"name": "photos_small", "changed": changed},
        "hardware": group_identical_nodes([{"Alive": True, "Resources": r} for r in (HEAD, GPU, GPU)]),
    }
    return make_run(
        folder,
        config_dot_yaml=config,
        metrics_dot_jsonl=jsonl(*lines),
        quarantine_dot_jsonl=jsonl(*bad),
        crops_dot_png=png(600, 200, seed=1),
        attention__step_00000000_dot_png=png(700, 180, seed=2),
        attention__step_00000400_dot_png=png(700, 180, seed=3),
        environment_dot_json=environment,
        evaluation_step_00000400_dot_json={"checkpoint": "step_00000400", "knn_20": 0.481},
    )


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


def test_the_commonest_kind_comes_first(tmp_path: Path) -> None:
    bad = [
        {"position": i, "status": s, "key": f"{i}.jpg"} for i, s in enumerate(["missing", *["too_large"] * 2])
    ]
    text = Page(build_report(make_run(tmp_path, quarantine_dot_jsonl=jsonl(*bad)))).text
    assert text.index("too many bytes2") < text.index("missing1")


def test_bad_images_are_summed_up_by_kind(fed: Page) -> None:
    section = fed.text.split("Bad images")[1].split("Scores")[0]
    assert (
        "Images that could not be used: 100 (0.39 % of 25,600 images seen, 39% of the limit "
        "data.max_bad_fraction=0.01). Each was replaced by another image." in section
    )
    assert "damaged or cut off JPEG400.16 %train/2019/archive-of-summer/IMG_000000.jpg" in section
    assert "missing200.078 %train/2019/archive-of-summer/IMG_000002.jpg" in section
    assert "empty200.078 %" in section
    assert "too many bytes200.078 %" in section
    assert "Rows of quarantine.jsonl: first 20 of 100" in section
    assert len(fed.all("details")) == 4


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"hello, world", "not an image"),
        (png(8, 8)[:-20], "damaged or cut off PNG"),
        (png(60, 60), "too large"),
        (png(2, 60), "too small"),
    ],
)
def test_what_the_decoder_says_is_grouped_by_its_words(data: bytes, kind: str) -> None:
    with pytest.raises(BadImage) as error:
        decode(data, max_pixels=3000, min_side=4)
    assert kind_of("corrupt", error.value.reason) == kind


@pytest.mark.parametrize(
    ("status", "reason", "kind"),
    [
        ("corrupt", "null", "empty"),
        ("corrupt", "shards/a-3.parquet changed after it was listed", "changed file or damaged shard"),
        ("corrupt", "s3://b/k has 5 bytes, not 7 as listed: list again", "changed file or damaged shard"),
        ("missing", "/images/a.jpg: No such file or directory", "missing"),
        ("unreachable", "s3://b/k: gave up after 5 attempts", "unreachable"),
        ("of another version", "x", "of another version"),
        (None, None, "None"),
        (["x"], {"y": 1}, "['x']"),
    ],
)
def test_what_storage_says_is_grouped_by_status(status: Any, reason: Any, kind: str) -> None:
    assert kind_of(status, reason) == kind


def test_many_kinds_are_shown_as_others(tmp_path: Path) -> None:
    bad = [{"position": i, "status": f"kind {i:02d}", "key": f"{i}.jpg", "reason": ""} for i in range(30)]
    text = Page(build_report(make_run(tmp_path, quarantine_dot_jsonl=jsonl(*bad)))).text
    assert "kind 1111" in text.replace(".jpg", "")
    assert "other kinds1812.jpg" in text


@pytest.mark.parametrize(
    ("bad", "seen", "limit", "told"),
    [(4, 1000, 0.01, False), (5, 1000, 0.01, True), (50, 999, 0.01, False), (0, 1000, 0.0, False)],
)
def test_a_run_near_its_limit_is_told_of(bad: int, seen: int, limit: float, told: bool) -> None:
    line = near_limit_warning(Share(bad, seen, limit))
    assert (line is not None) is told
    assert not told or "0.5 % of the images seen; the run fails above data.max_bad_fraction=0.01." in str(
        line
    )


@pytest.mark.parametrize("number", [0, 1, 4, 5, 6, 40])
@pytest.mark.parametrize("end", [b"", b'{"position": 9', b'{"position": 9}'])
def test_only_the_head_of_a_long_file_is_looked_into(tmp_path: Path, number: int, end: bytes) -> None:
    lines = b"".join(b'{"position": %d}\n' % i for i in range(number))
    rows, total = read_head(make_run(tmp_path, a_dot_jsonl=lines + end), "a.jsonl", 5)
    assert total == number + (end[-1:] == b"}" and number <= 5)
    assert [row["position"] for row in rows[:5]] == [*range(number), *([9] if end[-1:] == b"}" else [])][:5]
    assert len(rows) <= 6


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
