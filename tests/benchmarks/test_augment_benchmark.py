"""benchmarks/augment.py as people start it, on two small images, and the arithmetic behind its tables."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import augment_images
import augment_peers
import augment_tables
import numpy as np
import pytest
import simplejpeg
from image_files import encode, picture
from paths import ROOT
from PIL import Image

from dinoray.models.errors import DataError
from dinoray.pipeline.augment.config import CropsConfig

SMALL = ["crops.global_crop_size=32", "crops.local_crop_size=16", "crops.num_local_crops=3"]


def start(*arguments: str | Path, python_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "augment.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **({"PYTHONPATH": str(python_path)} if python_path else {})},
        capture_output=True,
        text=True,
        check=False,
    )


class Run(NamedTuple):
    output: str
    report: dict[str, Any]
    chart: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two JPEG files among others, four pipelines, and one whose library has no transforms."""
    folder, other = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("other")
    (folder / "a.png").write_bytes(encode(picture(), "PNG"))
    (folder / "b.jpg").write_bytes(encode(picture(), "JPEG"))
    (folder / "below").mkdir()
    (folder / "below" / "no suffix").write_bytes(encode(Image.fromarray(picture()).convert("L"), "JPEG"))
    (other / "lightly").mkdir()
    (other / "lightly" / "__init__.py").touch()
    arguments = [
        "--images",
        folder,
        "--rounds",
        "1",
        "--json",
        other / "out.json",
        "--plot",
        other / "out.png",
    ]
    only = ["--only", "published", "lightly", "ours", "ours, colours on the device", "decode only"]
    done = start(*SMALL, *arguments, *only, python_path=other)
    assert done.returncode == 0, done.stderr
    return Run(done.stdout, json.loads((other / "out.json").read_text()), other / "out.png")


def test_the_report_has_a_row_for_each_pipeline(run: Run) -> None:
    rows = run.report["rows"]
    assert [(row["name"], row["output"]) for row in rows] == [
        ("published", "float32"),
        ("ours", "uint8"),
        ("ours, colours on the device", "uint8"),
        ("decode only", ""),
    ]
    assert list(run.report["sets"].values()) == [rows]
    for row in rows:
        assert row["images_per_second"] > 0
        assert row["cpu_milliseconds"] > 0
        assert row.keys() == set(augment_tables.Row._fields)
    assert run.report["machine"]["versions"].keys() >= {"torch", "torchvision", "pillow"}


def test_the_published_pipeline_is_once_as_fast_as_itself(run: Run) -> None:
    published, ours, _, floor = run.report["rows"]
    assert published["ratio_to_published"] == 1.0
    assert floor["ratio_to_decode_only"] == 1.0
    assert ours["ratio_to_published"] > 0
    # The floor does a part of the work alone.
    assert floor["ratio_to_published"] > 1 > published["ratio_to_decode_only"]


def test_what_is_not_installed_is_left_out_and_said(run: Run) -> None:
    assert run.report["left_out"] == {"lightly": "not installed: lightly.transforms"}
    assert "| lightly | not installed: lightly.transforms |" in run.output


def test_a_line_says_what_the_images_are(run: Run) -> None:
    assert "2 JPEG files, 0.00 megapixels" in run.output
    assert "1 other file skipped" in run.output


def test_the_chart_is_a_picture(run: Run) -> None:
    with Image.open(run.chart) as chart:
        assert (chart.format, np.asarray(chart.convert("L")).min() < 128) == ("PNG", True)


def test_a_wrong_name_ends_in_one_line() -> None:
    done = start("--only", "ourz")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "ourz" in done.stderr


def test_ratios_are_medians_over_the_images_and_rates_are_over_all_images() -> None:
    seconds = {"published": [4.0, 8.0, 6.0], "ours": [1.0, 4.0, 1.0], "decode only": [0.5, 1.0, 0.75]}
    published, ours, floor = augment_tables.rows_of(seconds, dict.fromkeys(seconds, "uint8"))
    # Image by image ours is 4, 2 and 6 times as fast, at 1/2, 1/4 and 3/4 of the floor's speed.
    assert ours == ("ours", "uint8", 0.5, 4.0, 1000.0, 0.5)
    assert (published.ratio_to_published, floor.ratio_to_decode_only) == (1.0, 1.0)
    assert published.images_per_second == 3 / 18


def test_without_the_published_pipeline_there_is_no_ratio_to_it() -> None:
    (row,) = augment_tables.rows_of({"ours": [0.25]}, {"ours": "uint8"})
    assert (row.ratio_to_published, row.ratio_to_decode_only) == (None, None)
    assert "| **ours** | uint8 | 4.0 | - | 250.00 | - |" in augment_tables.table("set", [row], {})


def crops(*sides: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (side, side, 3), np.uint8) for side in sides]


def test_crops_may_be_stacked_or_not_and_have_channels_first_or_last() -> None:
    config = CropsConfig(global_crop_size=32, local_crop_size=16, num_local_crops=2)
    single, again = crops(32, 32, 16, 16), crops(32, 32, 16, 16, seed=1)
    stacked = [np.stack(single[:2]).transpose(0, 3, 1, 2), np.stack(single[2:])]
    assert augment_peers.look_at("peer", single, again, config) == "uint8"
    assert augment_peers.look_at("peer", stacked, [stacked[0], 255 - stacked[1]], config) == "uint8"


@pytest.mark.parametrize("sides", [(32, 32, 16), (32, 16, 16, 16), (32, 32, 16, 17)])
def test_a_pipeline_that_makes_other_crops_is_refused(sides: Sequence[int]) -> None:
    config = CropsConfig(global_crop_size=32, local_crop_size=16, num_local_crops=2)
    with pytest.raises(ValueError, match="peer makes other crops"):
        augment_peers.look_at("peer", crops(*sides), crops(*sides, seed=1), config)


def test_a_pipeline_without_randomness_is_refused() -> None:
    config = CropsConfig(global_crop_size=32, local_crop_size=16, num_local_crops=1)
    with pytest.raises(ValueError, match="nothing in them is random"):
        augment_peers.look_at("peer", crops(32, 32, 16), crops(32, 32, 16), config)


def test_the_published_pipeline_follows_the_config() -> None:
    """With nothing left to chance it makes the picture itself, normalised."""
    config = CropsConfig(
        num_local_crops=0, global_crop_size=40, global_crop_scale=(1, 1), aspect_ratio=(1, 1), flip_prob=1,
        jitter_prob=0, gray_prob=0, global_blur_prob=(0, 0), global_solarize_prob=(0, 1), solarize_threshold=0,
    )  # fmt: skip
    square = np.ascontiguousarray(picture()[:, :40])
    data = encode(square, "JPEG")
    seen = simplejpeg.decode_jpeg(data, "RGB")[:, ::-1]
    plain, solarized = augment_peers.published(config)(data)
    for crop, pixels in ((plain, seen), (solarized, 255 - seen)):
        expected = (pixels / 255 - config.pixel_mean) / config.pixel_std
        np.testing.assert_allclose(crop.numpy().transpose(1, 2, 0), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["0.2 MP"])
def test_drawn_files_are_like_the_photographs_they_stand_for(name: str) -> None:
    kind = augment_images.KINDS[name]
    files = augment_images.draw_photos(kind, 2)
    assert files == augment_images.draw_photos(kind, 2)
    for file, sides in zip(files, [(kind.height, kind.width), (kind.width, kind.height)], strict=True):
        assert simplejpeg.decode_jpeg_header(file) == (*sides, "YCbCr", "444")
        assert 0.9 < 8 * len(file) / (kind.width * kind.height) / kind.bits_per_pixel <= 1


def test_a_folder_without_a_jpeg_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(picture(), "PNG"))
    (tmp_path / "b.jpg").write_bytes(encode(picture(), "JPEG")[:-300])
    with pytest.raises(DataError, match="no JPEG file"):
        augment_images.read_photos(tmp_path, 3)
