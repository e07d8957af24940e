"""Without Ray: a stream that begins in the middle has the crops of one that began at the start, from each source."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from samples import write_all
from source_sets import IMAGES, LABELS, Set, addresses, hugging_face, tar_files
from sources import source_of

from dinoray.pipeline.augment.augmenter import Augmenter
from dinoray.pipeline.augment.config import CropsConfig


@pytest.mark.parametrize("make", [tar_files, hugging_face, addresses])
def test_a_resumed_stream_has_the_crops_of_an_uninterrupted_one(
    make: Callable[[], Set], tmp_path: Path
) -> None:
    data = make()
    write_all(tmp_path, data.files)
    settings = dict(setting.removeprefix("data.").split("=") for setting in data.settings)
    source = source_of(str(tmp_path), row_group_cache_bytes=30_000, **settings)
    found = source.fetch(range(24))
    assert [fetched.key for fetched in found] == data.keys
    assert [fetched.data for fetched in found] == IMAGES
    assert [fetched.label for fetched in found] == LABELS
    order, crops = source.order(5), CropsConfig(num_local_crops=1, global_crop_size=32, local_crop_size=16)
    actors = [Augmenter(source, order, crops, seed=5, num_threads=1) for _ in range(2)]
    whole, resumed = actors[0].block(np.arange(60)), actors[1].block(np.arange(37, 60))
    assert not whole["status"].any()
    for name in ("global_crops", "local_crops", "position"):
        np.testing.assert_array_equal(whole[name][37:], resumed[name])
