"""What is measured in the middle of a run: with labels, without, and with augmented views."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ranks import eval_config, labelled_source, seeded_backbone
from tiny import tiny_config

from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation import in_training
from dinoray.pipeline.evaluation.backbone_outputs import embed_views
from dinoray.pipeline.evaluation.clid import learnability_and_dimension
from dinoray.pipeline.evaluation.config import ProbeConfig
from dinoray.pipeline.evaluation.features import Features, Shares, embed, embed_source, eval_batches
from dinoray.pipeline.evaluation.in_training import Evaluation, evaluate
from dinoray.pipeline.evaluation.knn import knn_accuracy
from dinoray.pipeline.evaluation.labels import subset
from dinoray.pipeline.evaluation.probes import lidar, rankme
from dinoray.pipeline.evaluation.published import Cut, Preprocessing

CROPS = tiny_config().crops
PROBE = ProbeConfig(lidar_images=6, lidar_views=3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return labelled_source(Path(tmp_path_factory.mktemp("images")) / "train")


PICTURES = [("a.jpg", np.zeros((40, 40, 3), np.uint8))]


def found(
    source: Source,
    *,
    labelled: bool,
    draws: bool = False,
    preprocessing: Preprocessing | None = None,
    **changes: bool,
) -> Evaluation:
    result = evaluate(
        seeded_backbone(),
        (source, source) if labelled else None,
        source,
        PICTURES if draws else [],
        title="step 0",
        algorithm=tiny_config(),
        config=eval_config().model_copy(update=changes),
        probe=PROBE,
        preprocessing=preprocessing,
    )
    assert result is not None
    return result


def features(source: Source) -> Features:
    indices = np.arange(source.num_images)
    return embed_source(seeded_backbone(), source, indices, CROPS, eval_config(), precision="fp32")


def test_with_labels_there_are_accuracies_and_the_rank_of_the_voters(source: Source) -> None:
    scores = found(source, labelled=True).scores
    side = features(source)
    label_free = {"rankme": rankme(side.features), **learnability_and_dimension(side.features)}
    assert scores == knn_accuracy(side, side, eval_config()) | {"num_val": 9, **label_free}


def test_without_labels_there_are_rank_and_clid_unless_they_are_switched_off(source: Source) -> None:
    rows = features(source).features
    assert found(source, labelled=False).scores == {
        "rankme": rankme(rows),
        **learnability_and_dimension(rows),
    }
    assert found(source, labelled=False, label_free=False).scores == {}


def test_another_preprocessing_takes_its_own_cut_mean_and_std(source: Source) -> None:
    theirs = Preprocessing("timm's", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), share=0.5, interpolation="bilinear")
    rows = found(source, labelled=False, preprocessing=theirs).scores["rankme"]
    crops = CROPS.model_copy(update={"pixel_mean": theirs.mean, "pixel_std": theirs.std})
    cut = Cut(64, Image.Resampling.BILINEAR)
    batches = eval_batches(source, range(9), size=32, batch_size=9, cut=cut)
    side = [embed(seeded_backbone(), images, crops, precision="fp32") for images, *_ in batches]
    assert rows == pytest.approx(rankme(np.concatenate(side)), rel=1e-5)
    assert rows != pytest.approx(rankme(features(source).features), rel=1e-3)


def test_lidar_takes_augmented_views_of_a_fixed_subset(source: Source) -> None:
    scores = found(source, labelled=False, lidar=True).scores
    views = embed_views(
        seeded_backbone(),
        source,
        subset(source.num_images, 6).tolist(),
        CROPS,
        num_views=3,
        seed=0,
        batch_size=2,
        precision="fp32",
    )
    assert views.shape == (6, 3, 16)
    assert scores["lidar"] == pytest.approx(lidar(views), rel=1e-6)


def test_nothing_is_drawn_without_pictures(source: Source) -> None:
    result = found(source, labelled=False)
    assert (result.attention, result.embedding) == (None, None)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("number", [3, 500])
def test_with_pictures_some_images_are_embedded_with_labels_and_thumbnails(
    source: Source, labelled: bool, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_training, "_NUM_EMBEDDED", number)
    embedding = found(source, labelled=labelled, draws=True).embedding
    assert embedding is not None
    side = features(source)
    apart = {3: 3, 500: 1}[number]  # of nine
    np.testing.assert_array_equal(embedding.features, side.features[::apart])
    assert embedding.labels == side.labels[::apart]
    crops = np.concatenate([images for images, *_ in eval_batches(source, range(9), size=32, batch_size=2)])
    np.testing.assert_array_equal(embedding.thumbnails, crops[::apart])  # 32 px as they are


def test_more_ranks_than_images_to_show_still_show_no_more_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_training, "_NUM_EMBEDDED", 2)
    monkeypatch.setattr(in_training.distributed, "gather", lambda mine: [mine] * 3)
    shown = in_training._Shown(9, Shares((0,), 3))
    batch = Features(np.arange(12, dtype=np.float32).reshape(3, 4), ["a", "b", "c"], 0)
    shown.on_batch[0](np.zeros((3, 32, 32, 3), np.uint8), batch)
    embedding = shown.share()
    assert embedding is not None
    assert embedding.labels == ["a", "a"]  # each rank has kept one of its three
