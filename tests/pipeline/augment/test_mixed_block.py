"""Blocks of crops of a mix: the same in any cut of the positions, and a bad image is replaced from its own source."""

import json
from pathlib import Path

import numpy as np
from image_files import jpeg, scene
from samples import parquet, write_all

from dinoray.pipeline.augment.augmenter import Augmenter
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.reading.source import Source, Status

CROPS = CropsConfig(num_local_crops=1, global_crop_size=32, local_crop_size=16, kernel="torch")


def test_blocks_of_a_mix_are_those_of_its_positions_and_bad_images_have_their_source(tmp_path: Path) -> None:
    pictures = [jpeg(scene(40 + number, 40)) for number in range(6)]
    photos = {f"{number}.jpg": picture for number, picture in enumerate(pictures[:3])}
    write_all(tmp_path / "photos", {**photos, "1.jpg": b"no image"})
    write_all(tmp_path / "web", {"a.parquet": parquet({"image": pictures[3:] * 3}, row_group_size=2)})
    mix = {str(tmp_path / "photos"): 1.0, str(tmp_path / "web"): 2.0}
    config = DataConfig.model_validate({"mix": mix})
    source = Source(config, build_manifest(config))
    order = source.order(5)

    def block(first: int, stop: int) -> dict[str, np.ndarray]:
        return Augmenter(source, order, CROPS, seed=5, num_threads=1).block(np.arange(first, stop))

    whole, rest = block(0, 24), block(10, 24)
    for name in ("global_crops", "local_crops", "status", "note"):
        np.testing.assert_array_equal(whole[name][10:], rest[name])
    passes, images = order.locate(np.arange(24))
    is_bad = images == 1
    assert is_bad.sum() >= 2  # in several passes
    assert set(passes[is_bad].tolist()) == set(range(int(is_bad.sum())))
    assert (whole["status"] == np.where(is_bad, Status.CORRUPT, Status.OK)).all()
    assert {json.loads(note)["key"] for note in whole["note"][is_bad]} == {"photos: 1.jpg"}
    # An image that comes again has other crops.
    again = np.flatnonzero(images == 0)
    assert len(again) >= 2
    first, second = whole["global_crops"][again[:2]]
    assert (first != second).any()
