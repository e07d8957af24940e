"""Several sources mixed by weight: settings, manifest, images, labels, and how much is read."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from samples import write_all
from sources import IMAGES, as_shard
from tars import tar_of

from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest, build_manifest, load_or_build
from dinoray.pipeline.data.mixture import BLOCK
from dinoray.pipeline.data.reading.group_reader import GroupReader
from dinoray.pipeline.data.reading.reads import count_reads
from dinoray.pipeline.data.reading.sharing import groups_ahead, share_reading
from dinoray.pipeline.data.reading.source import Source, Status
from dinoray.pipeline.evaluation.class_names import overlap_warnings
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.labels import held_out, labelled_sources, with_labels
from dinoray.pipeline.storage.files import Directory

MORE = {f"{'bc'[number % 2]}/{number:03}.jpg": bytes([65 + number]) * 60 for number in range(40)}
TAR = {f"{number:03}.jpg": bytes([1 + number]) * 50 for number in range(30)}


@pytest.fixture
def mix(tmp_path: Path) -> dict[str, float]:
    """A folder of 18 images, Parquet of 40 in row groups of 4, and a tar file of 30 without labels."""
    write_all(tmp_path / "photos", {**IMAGES, "notes.txt": b"x"})
    write_all(tmp_path / "web", {"a.parquet": as_shard(MORE)})
    write_all(tmp_path / "tars", {"a.tar": tar_of(TAR)})
    return {str(tmp_path / name): weight for name, weight in (("photos", 7), ("web", 2), ("tars", 1))}


def config_of(mix: Mapping[str, float], **more: Any) -> DataConfig:
    return DataConfig.model_validate({"mix": mix, "row_group_cache_bytes": 2000, **more})


def source_of(mix: Mapping[str, float], **more: Any) -> Source:
    return Source(config_of(mix, **more), build_manifest(config_of(mix, **more)))


def test_images_of_all_sources_have_one_number_each_and_keys_with_their_source(mix: dict[str, float]) -> None:
    source = pickle.loads(pickle.dumps(source_of(mix)))
    keys = [*sorted(IMAGES), *(f"a.tar#{name}" for name in TAR), *(f"a.parquet#{row}" for row in range(40))]
    names = ["photos"] * 18 + ["tars"] * 30 + ["web"] * 40
    expected = [f"{name}: {key}" for name, key in zip(names, keys, strict=True)]
    assert [source.key(image) for image in range(source.num_images)] == expected
    images = source.fetch(range(88))
    assert [image.key for image in images] == expected
    data = [*(IMAGES[key] for key in sorted(IMAGES)), *TAR.values(), *MORE.values()]
    assert [image.data for image in images] == data
    chosen = source.select(np.array([60, 3, 20]))
    assert [image.data for image in chosen.fetch([2, 1, 0])] == [data[20], data[3], data[60]]
    assert chosen.key(0) == expected[60]


def test_a_manifest_of_a_mix_is_one_file_that_lists_no_more(mix: dict[str, float], tmp_path: Path) -> None:
    config, run = config_of(mix), Directory(str(tmp_path / "run"))
    first = load_or_build(config, run)
    write_all(tmp_path / "photos", {"a/new.jpg": b"new"})
    run.write("config.yaml", b"")
    kept = load_or_build(config_of(dict(reversed(mix.items()))), run)
    assert kept.to_bytes() == first.to_bytes()
    assert [one.kind for one in kept.sources] == ["images", "tar", "parquet"]
    assert kept.num_images == 88
    with pytest.raises(ConfigError, match=r"data\.mix=.*: 3.*, but the manifest of this run was listed with"):
        load_or_build(config_of({**mix, next(iter(mix)): 3}), run)
    with pytest.raises(ConfigError, match=r"data\.path="):
        load_or_build(DataConfig(path=next(iter(mix))), run)
    alone = build_manifest(DataConfig(path=next(iter(mix))))
    assert "mix" not in alone.listed_as  # as those of earlier versions


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": "photos", "mix": {"a": 1, "b": 1}}, "leave out data.path, or set data.mix=null"),
        ({"mix": {"a": 1}}, "names one source; set data.path=a and data.mix=null"),
        ({"mix": {"a": 1, "./a/": 1}}, "twice; leave out one"),
        ({"mix": {"a": 1, "b": 0}}, "b has the weight 0"),
        ({"mix": {"a": 1, "b": -1}}, "b has the weight -1"),
        ({"mix": {"a": 1e9, "b": 1}}, "at least 1e-05 of all"),
        ({"mix": {"a": 1, "b": 1}, "manifest": "m.parquet"}, "data.manifest=m.parquet is of one source"),
        ({"mix": {"a": 1, "b": 1}, "image_list": "l.csv"}, "data.image_list=l.csv is of one source"),
        ({"mix": {"a": 1, "gs://b": 1}}, "use a local path or s3://bucket/prefix"),
        ({"mix": {"a": 1, "https://me:secret@b": 1}}, "belong in the environment"),
    ],
)
def test_a_mix_that_says_nothing_sensible_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words) as caught:
        DataConfig.model_validate(settings)
    assert "secret" not in str(caught.value.errors()[0]["msg"])


def test_a_mix_is_named_by_its_sources_and_read_back_from_a_file() -> None:
    config = DataConfig.model_validate({"mix": {"my, photos": 0.7, "s3://b/web": 1 / 3}})
    assert config.path == "my, photos + s3://b/web"
    assert config.address == 'data.mix={"my, photos": 0.7, s3://b/web: 0.333333333333}'
    assert DataConfig.model_validate(config.model_dump(mode="json")) == config
    assert DataConfig.model_validate({"path": "x", "mix": None}).mix == {}


def test_an_error_names_the_source(mix: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"data.mix={tmp_path}/none: there is no such folder"):
        build_manifest(config_of({**mix, f"{tmp_path}/none": 1}))


def test_settings_of_columns_are_for_the_sources_that_have_columns(mix: dict[str, float]) -> None:
    source = source_of(mix, label_column="name")
    assert [image.label for image in source.fetch([0, 18, 48])] == ["a", None, "b/000.jpg"]
    with pytest.raises(ConfigError, match=r"web/a\.parquet has no column 'none'"):
        build_manifest(config_of(mix, label_column="none"))


def test_an_image_that_cannot_be_read_is_named_with_its_source(mix: dict[str, float], tmp_path: Path) -> None:
    source = source_of(mix)
    (tmp_path / "photos" / "a" / "3.jpg").unlink()
    (bad,) = [image for image in source.fetch(range(88)) if image.data is None]
    assert (bad.key, bad.status) == ("photos: a/3.jpg", Status.MISSING)


def test_labels_of_one_name_are_one_class_and_images_without_them_are_not_evaluated(
    mix: dict[str, float],
) -> None:
    source = source_of(mix)
    labelled = with_labels(source)
    assert labelled.num_images == 18 + 40
    sides = held_out(source, max_train_images=100, max_val_images=100)
    assert sides is not None
    assert {image.label for side in sides for image in side.fetch(range(side.num_images))} == set("abc")
    config = EvalConfig(val_path=next(iter(mix)))
    named = labelled_sources(source.config, config)
    assert named is not None
    assert [side.num_images for side in named] == [18 + 40, 18]
    photos, tars = next(iter(mix)), [*mix][2]
    assert held_out(source_of({tars: 1, f"{tars}/a.tar": 1}), max_train_images=9, max_val_images=9) is None
    val = Source(DataConfig(path=photos), build_manifest(DataConfig(path=photos)))
    (warning,) = overlap_warnings((labelled, val), EvalConfig(val_path=photos))
    assert "images vote for themselves" in warning


def test_readers_of_a_mix_read_each_row_group_and_chunk_once(
    mix: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(mix)
    order, read = source.order(1), list[str]()
    before = Source.read
    monkeypatch.setattr(
        Source, "read", lambda self, key, work: (read.append(key), before(self, key, work))[1]
    )
    sharing = share_reading(source.manifest, order, most_actors=2, cpus_per_actor=1, rows_per_block=16)
    assert sharing is not None
    reader = GroupReader(source, sharing.cache_bytes)
    data = [*(IMAGES[key] for key in sorted(IMAGES)), *TAR.values(), *MORE.values()]
    images = order.locate(np.arange(2 * BLOCK))[1]
    groups = np.searchsorted(np.cumsum(source.manifest.group_sizes), images, side="right")
    for first in range(0, len(images), 16):
        ahead = groups_ahead(order, first, len(images))
        if ahead is not None:
            reader.read_ahead(ahead)
        wanted = images[first : first + 16][groups[first : first + 16] > 0].tolist()
        assert [one.data for one in reader.fetch(wanted)] == [data[image] for image in wanted]
    assert len(set(groups[groups > 0].tolist())) == 11
    assert len(read) == 11 + 1  # and the footer of the Parquet file: all fit into the cache


def test_what_is_read_of_a_mix_is_counted_by_shares(mix: dict[str, float]) -> None:
    source = source_of(mix)
    reads = count_reads(
        source.manifest,
        source.order(1),
        train_workers=1,
        global_batch_size=8,
        image_bytes=100,
        most_actors=2,
    )
    # Each object is a request, 4 rows of Parquet, and all 30 images of the tar file.
    assert reads.images_per_request == pytest.approx(1 / (0.7 + 0.2 / 4 + 0.1 / 30))
    assert reads.times_read == 1


def test_a_manifest_of_one_source_is_no_mixture() -> None:
    with pytest.raises(DataError, match="is damaged"):
        Manifest.read(b"x", "the manifest", "delete it")
