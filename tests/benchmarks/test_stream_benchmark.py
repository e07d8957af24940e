"""benchmarks/stream.py as people start it, on few small images, and the arithmetic behind its tables."""

import json
from typing import Any

import pytest
import stream
import stream_tables
from image_files import encode, picture
from jobs_processes import run_job
from paths import ROOT

from dinoray.models.errors import ConfigError

SMALL = ["crops.global_crop_size=32", "crops.local_crop_size=16", "crops.num_local_crops=3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Two consumers of one actor, 48 blocks of 8 images."""
    folder, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("out") / "out.json"
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(encode(picture(), "JPEG"))
    arguments = [
        "--path",
        str(folder),
        "--pools",
        "1x1",
        "--consumers",
        "2",
        "--images",
        "384",
        "--rounds",
        "1",
    ]
    blocks = ["--batch", "4", "--block-images", "8", "--stats", "--json", str(out)]
    printed = run_job("benchmarks.stream", *SMALL, *arguments, *blocks, env=BENCHMARKS)
    return printed, json.loads(out.read_text())


BENCHMARKS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}


@pytest.mark.ray
@pytest.mark.nightly
def test_all_images_that_were_asked_for_arrive_and_most_of_them_are_measured(run: Any) -> None:
    (line,) = run[1]["lines"]
    ((stream,), (kernel,), (block,)) = (line["rounds"][side] for side in ("stream", "kernel", "block"))
    assert (line["actors"], line["threads"], line["consumers"], line["images_per_block"]) == (1, 1, 2, 8)
    assert (stream["images"], kernel["images"], block["images"]) == (384, 384, 384)
    # Of 24 blocks of each consumer 4 are left out at either end, and the last one measured is the next one's wait.
    assert stream["images_measured"] == 2 * 8 * (24 - 1 - 4 - 4)
    assert line["bytes_per_image"] == 2 * 32 * 32 * 3 + 3 * 16 * 16 * 3


@pytest.mark.ray
@pytest.mark.nightly
def test_processes_and_stages_both_add_up_to_all_cpu_time(run: Any) -> None:
    (line,) = run[1]["lines"]
    for parts in ("cpu_ms_by_stage", "cpu_ms_by_process"):
        assert sum(line[parts].values()) == pytest.approx(line["stream_cpu_ms"])
    processes = line["cpu_ms_by_process"]
    assert set(line["cpu_ms_by_stage"]) == set(stream_tables.STAGES)
    assert set(processes) == set(stream_tables.PROCESSES)
    # Found by their titles, and each does something; decoding and cropping are a part of what the actor does.
    assert min(processes[name] for name in ("actor", "consumers", "coordinator", "raylet")) > 0
    assert line["cpu_ms_by_stage"]["decode"] > 0 < line["cpu_ms_by_stage"]["crop"]


@pytest.mark.ray
@pytest.mark.nightly
def test_ratios_are_those_of_the_figures_beside_them(run: Any) -> None:
    (line,) = run[1]["lines"]
    by_clock = line["stream_images_per_second"] / line["kernel_images_per_second"]
    assert line["ratio_by_clock"] == pytest.approx(by_clock)
    assert line["ratio_by_cpu"] == pytest.approx(line["kernel_cpu_ms"] / line["stream_cpu_ms"])
    assert 0 < line["waited"] <= 1


@pytest.mark.ray
@pytest.mark.nightly
def test_ray_datas_own_account_is_printed(run: Any) -> None:
    assert "MapBatches(MultiCropActor): 48 tasks executed, 48 blocks produced" in run[0]
    assert "| 1x1, 2 consumers | 8 |" in run[0]


def test_too_few_images_to_leave_the_ends_out_are_refused_with_the_remedy() -> None:
    arguments = [
        "--pools",
        "1x1",
        "--consumers",
        "1",
        "--images",
        "64",
        "--batch",
        "8",
        "--block-images",
        "8",
    ]
    with pytest.raises(ConfigError, match="take --images=96"):
        stream.main([*SMALL, *arguments, "--rounds", "1"])


def test_serialise_is_what_an_actor_does_beside_its_stages_and_nothing_is_lost() -> None:
    processes = {"actor": 9.0, "consumers": 1.0, "coordinator": 2.0, "raylet": 0.5, "others": 0.25}
    stages = stream_tables.by_stage({"fetch": 1.0, "decode": 3.0, "crop": 4.0}, processes)
    assert stages["serialise"] == 1.0
    assert (stages["deliver"], stages["collate"], stages["idle"]) == (2.5, 1.0, 0.25)
    assert sum(stages.values()) == sum(processes.values())


@pytest.mark.parametrize(
    ("title", "role"),
    [
        ("ray::MapWorker(MapBatches(MultiCropActor))", "actor"),
        ("ray::consume", "consumers"),
        ("ray::SplitCoordinator", "coordinator"),
        ("/site-packages/ray/core/src/ray/raylet/raylet --raylet_socket_name=x", "raylet"),
        ("ray::IDLE", "others"),
        ("python -c from multiprocessing.spawn import spawn_main", None),
    ],
)
def test_a_process_is_known_by_its_title(title: str, role: str | None) -> None:
    assert stream_tables.role_of(title) == role
