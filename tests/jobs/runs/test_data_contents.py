"""What `doctor` says of the data: how many images, of which kinds, what is bad and ignored, and how to go on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from image_files import encode, scene
from PIL import Image
from samples import parquet, put_all, write_all
from servers import S3Server

from dinoray.jobs.cli.config import load_config
from dinoray.jobs.runs.data_contents import look_into_data
from dinoray.models.errors import DataError
from dinoray.pipeline.data.listing.bounds import Bound

SMALL = [encode(scene(64 + n, 48), "JPEG") for n in range(4)]


class Clock:
    """A second passes at each look at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def look(
    path: object, *overrides: str, bound: Bound | None = None, recipe: str | None = "photos_small"
) -> dict[str, str]:
    config = load_config(recipe, None, [f"data.path={path}", *overrides])
    lines, _ = look_into_data(config, recipe=recipe, overrides=overrides, bound=bound)
    return {line.name: f"{line.verdict} {line.text}" for line in lines}


def test_class_folders_are_described_with_what_is_bad_and_ignored(tmp_path: Path) -> None:
    files = {f"{label}/{n}.jpg": SMALL[n] for label in "ab" for n in range(4)}
    files |= {"a/9.png": encode(Image.new("L", (30, 20)), "PNG"), "b/8.jpg": SMALL[0][:-200]}
    write_all(tmp_path, files | {"a/x.csv": b"x"})
    found = look(tmp_path, "data.label_from_parent=true", "storage.requester_pays=true", "train.epochs=1")
    assert found.keys() == {"contents", "left out", "images", "bad images", "next"}
    assert "10 images in 2 class folders" in found["contents"]
    assert "labels from folder names" in found["contents"]
    assert found["left out"] == "ok ignored: 1 .csv"
    assert (
        "9 read: 8 JPEG (RGB, 8 bits), 1 PNG (gray, 8 bits); median 65 x 48, 30 x 20 to 67 x 48 pixels"
        in (found["images"])
    )
    assert found["bad images"].startswith("warn 1 of 10 that were read cannot be used (1 damaged or cut off")
    assert "e.g. b/8.jpg: " in found["bad images"]
    assert "data.max_bad_fraction=0.01: mend them, or set it to 0.15" in found["bad images"]
    command = (
        f"dinoray pretrain --recipe photos_small data.path={tmp_path} data.label_from_parent=true "
        "storage.requester_pays=true"
    )
    assert found["next"] == f"ok {command}"


def test_arrays_of_other_channels_are_described_and_the_next_command_takes_them(tmp_path: Path) -> None:
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.full((40, 50, 5), number * 1000, np.uint16))
    unset = look(tmp_path)["bad images"]
    assert "5 channels, which are not red, green and blue; set data.channels=5" in unset
    settings = ["data.channels=5", "crops.saturation=0", "crops.hue=0", "crops.gray_prob=0"]
    found = look(tmp_path, *settings)
    assert "3 read: 3 NPY (5 channels, uint16); 50 x 40 pixels" in found["images"]
    assert "bad images" not in found
    assert found["next"].endswith(f"data.path={tmp_path} {' '.join(settings)}")


def test_large_photos_are_to_be_shrunk(tmp_path: Path) -> None:
    write_all(tmp_path / "my photos", {f"{n}.jpg": encode(scene(900, 600), "JPEG") for n in range(2)})
    found = look(tmp_path / "my photos")
    assert "the median image has 0.54 megapixels, crops need 0.034" in found["next"]
    pack = f"`dinoray pack '{tmp_path}/my photos' --out FOLDER --shrink --recipe photos_small`"
    assert f"{pack}, then `dinoray pretrain --recipe photos_small data.path=FOLDER`" in found["next"]


def test_without_a_recipe_auto_is_to_choose(tmp_path: Path) -> None:
    write_all(tmp_path, {f"{n}.jpg": encode(scene(900, 600), "JPEG") for n in range(2)})
    assert look(tmp_path, recipe=None)["next"] == f"ok dinoray pretrain data.path={tmp_path}"
    write_all(tmp_path, {f"{n}.jpg": encode(scene(1300, 900), "JPEG") for n in range(2)})
    pack = f"`dinoray pack {tmp_path} --out FOLDER --shrink`, then `dinoray pretrain data.path=FOLDER`"
    assert look(tmp_path, recipe=None)["next"].endswith(pack)


def test_few_parquet_files_of_many_are_read_and_the_rest_is_estimated(tmp_path: Path) -> None:
    shard = parquet({"image": SMALL * 8, "label": ["a", "b"] * 16}, row_group_size=8)
    write_all(tmp_path, {f"{n:02d}.parquet": shard for n in range(10)})
    whole = look(tmp_path)
    assert "320 images in 10 Parquet files" in look(tmp_path, bound=Bound(files=10))["contents"]
    assert "ok about 320 images, by the bytes of the files" in whole["contents"]
    assert "labels from column 'label'" in whole["contents"]
    assert "32 read: 32 JPEG" in whole["images"]


def test_a_listing_ends_when_its_time_is_over() -> None:
    ended = []

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            for number in range(100):
                yield pa.record_batch({"key": [f"{number}"]})
        finally:
            ended.append(True)

    bound = Bound(seconds=3, clock=Clock())
    assert len(list(bound.cut(batches()))) == 4
    assert (bound.num_listed, bound.last_key, bound.is_listed_whole) == (4, "3", False)
    assert ended


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    write_all(tmp_path, {"a.csv": b"x"})
    with pytest.raises(DataError, match=r"no images under"):
        look(tmp_path)


@pytest.mark.s3
def test_a_bucket_whose_listing_takes_too_long_is_estimated_by_its_folders(s3: S3Server, bucket: str) -> None:
    put_all(s3, bucket, {f"train/{n // 100:02d}/{n:04d}.jpg": SMALL[n % 4] for n in range(1100)})
    found = look(f"s3://{bucket}/train", bound=Bound(seconds=600))
    assert "ok 1,100 images in 11 class folders" in found["contents"]
    found = look(f"s3://{bucket}/train", bound=Bound(seconds=0.5, clock=Clock()))
    assert "ok about 1,100 images: 1,000 in the first 91% of the folders" in found["contents"]
