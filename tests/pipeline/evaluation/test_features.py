"""Features are those of each image alone."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import (
    IMAGES_PER_LABEL,
    LABELS,
    eval_config,
    evaluated,
    labelled_source,
    seeded_backbone,
    two_ranks,
)
from tiny import tiny_config

from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.decoding.decode import decode, eval_crop
from dinoray.pipeline.data.demo_images import draw_demo_image
from dinoray.pipeline.data.manifests.manifest import DataConfig, load_or_build
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.features import (
    Features,
    Shares,
    embed,
    embed_sharded,
    embed_source,
    eval_batches,
    merge,
)
from dinoray.pipeline.evaluation.labels import labelled_sources, subset
from dinoray.pipeline.storage.files import Directory

CROPS = tiny_config().crops


def features(rows: Sequence[Sequence[float]], labels: str | Sequence[str], *, num_bad: int = 0) -> Features:
    return Features(np.array(rows, np.float32).reshape(len(labels), -1), list(labels), num_bad)


def test_an_embedding_is_that_of_each_image_alone() -> None:
    backbone = seeded_backbone()
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    together = embed(backbone, images, CROPS, precision="fp32")
    assert (together.dtype, together.shape) == (np.float32, (5, 16))
    mean, std = np.array(CROPS.pixel_mean), np.array(CROPS.pixel_std)
    for image, row in zip(images, together, strict=True):
        x = torch.from_numpy(((image / 255 - mean) / std).transpose(2, 0, 1)[None]).float()
        np.testing.assert_allclose(row, backbone(x)[0].detach().numpy(), rtol=1e-4, atol=1e-5)


def test_no_images_have_no_features() -> None:
    none = embed(seeded_backbone(), np.empty((0, 32, 32, 3), np.uint8), CROPS, precision="fp32")
    assert len(none) == 0
    assert merge([Features(none, [], 2), features([[1.0]], "a", num_bad=1)])[1:3] == (["a"], 3)
    assert len(merge([]).features) == 0


def test_a_subset_is_fixed_sorted_and_free_of_repeats() -> None:
    some = subset(1000, 100)
    assert len(set(some.tolist())) == 100
    assert some.tolist() == sorted(some.tolist()) == subset(1000, 100).tolist()
    assert 0 <= some.min() < some.max() < 1000
    assert 400 < some.mean() < 600  # from all of them, not from the first
    assert set(some.tolist()) < set(subset(1000, 200).tolist())


def test_a_subset_of_few_images_is_all_of_them() -> None:
    assert subset(5, 5).tolist() == subset(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert len(subset(5, 4)) == 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return labelled_source(tmp_path_factory.mktemp("labelled") / "images")


def all_of(source: Source) -> Features:
    indices = np.arange(source.num_images)
    return embed_source(seeded_backbone(), source, indices, CROPS, eval_config(), precision="fp32")


def test_images_of_a_source_are_embedded_in_order_with_their_labels(source: Source) -> None:
    result = all_of(source)
    assert result.labels == [label for label in sorted(LABELS) for _ in range(IMAGES_PER_LABEL)]
    assert result.num_bad == 0
    for i, fetched in enumerate(source.fetch(range(source.num_images))):
        assert fetched.data is not None
        image = eval_crop(decode(fetched.data, max_pixels=10**6), size=32)
        alone = embed(seeded_backbone(), image[None], CROPS, precision="fp32")
        np.testing.assert_allclose(result.features[i], alone[0], rtol=1e-4, atol=1e-5)


def test_an_unreadable_image_is_left_out_and_counted(tmp_path: Path) -> None:
    source = labelled_source(tmp_path / "images")
    (tmp_path / "images" / "rings" / "1.jpg").write_bytes(b"no picture")
    (tmp_path / "images" / "dots" / "0.jpg").unlink()
    result = all_of(source)
    assert result.num_bad == 2
    assert result.labels == ["dots"] * 2 + ["rings"] * 2 + ["stripes"] * 3
    assert len(result.features) == len(result.labels)
    assert result.indices.tolist() == [1, 2, 3, 5, 6, 7, 8]
    some = result.only(np.array([2, 4, 8]))  # of 4 there are no features
    assert (some.indices.tolist(), some.labels) == ([2, 8], ["dots", "stripes"])
    assert np.array_equal(some.features, result.features[[1, 6]])


def test_an_image_without_a_label_is_named(source: Source, tmp_path: Path) -> None:
    config = DataConfig(path=source.config.path, label_from_parent=False)
    unlabelled = Source(config, load_or_build(config, Directory(str(tmp_path))))
    with pytest.raises(DataError, match=r"dots/0\.jpg has no label"):
        next(eval_batches(unlabelled, [0], size=32, batch_size=1))
    _, labels, *_ = next(eval_batches(unlabelled, [0], size=32, batch_size=1, labelled=False))
    assert labels == [""]


def test_a_blank_label_is_no_label(tmp_path: Path) -> None:
    (tmp_path / "images" / " ").mkdir(parents=True)
    (tmp_path / "images" / " " / "0.jpg").write_bytes(draw_demo_image("dots", "val", 0))
    config = DataConfig(path=str(tmp_path / "images"), label_from_parent=True)
    blank = Source(config, load_or_build(config, Directory(str(tmp_path))))
    with pytest.raises(DataError, match=r"0\.jpg has no label, .*; give it a label, or remove it$"):
        next(eval_batches(blank, [0], size=32, batch_size=1))
    (tmp_path / "images" / " ").rename(tmp_path / "images" / "dots")
    named = Source(config, load_or_build(config, Directory(str(tmp_path / "again"))))
    assert next(eval_batches(named, [0], size=32, batch_size=1))[1] == ["dots"]


def test_without_a_process_group_a_share_is_the_whole_subset(source: Source) -> None:
    whole, result = (
        all_of(source),
        embed_sharded(seeded_backbone(), source, CROPS, eval_config(), limit=4, precision="fp32"),
    )
    indices = subset(source.num_images, 4)
    assert result.labels == [whole.labels[i] for i in indices]
    np.testing.assert_allclose(result.features, whole.features[indices], rtol=1e-4, atol=1e-5)


def test_two_processes_embed_each_image_once_and_both_get_all(source: Source) -> None:
    whole = all_of(source)
    expected = sorted(zip(whole.labels, whole.features.tolist(), strict=True))
    for rank in two_ranks():
        found = sorted(zip(rank.features.labels, rank.features.features.tolist(), strict=True))
        assert [label for label, _ in found] == [label for label, _ in expected]
        np.testing.assert_allclose(
            [row for _, row in found], [row for _, row in expected], rtol=1e-3, atol=1e-4
        )


def test_two_processes_show_each_image_once_with_its_own_label(source: Source) -> None:
    whole = all_of(source)
    evaluation, other = (rank.evaluation for rank in two_ranks())
    assert other is None
    assert evaluation is not None
    first = evaluation.embedding
    assert first is not None
    rows = [*range(0, len(whole.labels), 2), *range(1, len(whole.labels), 2)]  # one rank's, then the other's
    assert first.labels == [whole.labels[row] for row in rows]
    np.testing.assert_allclose(first.features, whole.features[rows], rtol=1e-3, atol=1e-4)
    assert first.thumbnails.shape == (len(rows), 32, 32, 3)


def test_one_process_with_all_shares_finds_what_two_ranks_do_bit_for_bit(source: Source) -> None:
    there, here = two_ranks()[0].evaluation, evaluated(source, shares=Shares.of_all_ranks(2))
    assert there is not None
    assert here is not None
    assert here.scores == there.scores
    assert {"knn_1", "knn_3", "rankme", "lidar"} <= here.scores.keys()
    assert here.attention == there.attention
    assert here.embedding is not None
    assert there.embedding is not None
    np.testing.assert_array_equal(here.embedding.features, there.embedding.features)
    np.testing.assert_array_equal(here.embedding.thumbnails, there.embedding.thumbnails)
    assert here.embedding.labels == there.embedding.labels


# Where labels come from


def test_without_images_to_classify_there_is_no_evaluation() -> None:
    for path in (None, "auto"):
        assert labelled_sources(DataConfig(path="anywhere"), EvalConfig(val_path=path)) is None


def test_evaluation_without_labels_says_what_to_set(source: Source, tmp_path: Path) -> None:
    shutil.copytree(Path(source.config.path) / "dots", tmp_path / "loose")
    data, loose = DataConfig(path=source.config.path), str(tmp_path / "loose")
    with pytest.raises(
        ConfigError, match=r"eval\.val_path needs labels, but eval\.val_path=.*/loose has none"
    ):
        labelled_sources(data, EvalConfig(val_path=loose))
    assert labelled_sources(data, EvalConfig(val_path=source.config.path)) is not None  # labelled images
    assert labelled_sources(data, EvalConfig(val_path=None)) is None  # unset
    with pytest.raises(ConfigError, match=r"eval\.train_path=.*/loose has none: set data\.label_column"):
        labelled_sources(data, EvalConfig(val_path=source.config.path, train_path=loose))
    with pytest.raises(ConfigError, match=r"data\.path=.*/loose has none"):
        labelled_sources(DataConfig(path=loose), EvalConfig(val_path=source.config.path))


def test_voters_are_the_training_images_unless_said_otherwise(source: Source, tmp_path: Path) -> None:
    here, there = source.config.path, labelled_source(tmp_path / "other").config.path
    run = Directory(str(tmp_path / "run"))
    sources = labelled_sources(source.config, EvalConfig(val_path=there), run)
    assert sources is not None
    assert [side.config.path for side in sources] == [here, there]
    assert run.list() == ["manifest_eval_train.parquet", "manifest_eval_val.parquet"]
    sources = labelled_sources(source.config, EvalConfig(val_path=here, train_path=there))
    assert sources is not None
    assert [side.config.path for side in sources] == [there, here]
