"""What is measured in the middle of a run: with labels, without, and with augmented views."""

from pathlib import Path

import numpy as np
import pytest
from ranks import eval_config, labelled_source, seeded_backbone
from tiny import tiny_config

from pipeline.evaluation import Evaluation, evaluate
from pipeline.features import Features, embed_source, knn_accuracy, subset
from pipeline.frozen import embed_views
from pipeline.probes import ProbeConfig, lidar, rankme
from pipeline.source import Source

CROPS = tiny_config().crops
PROBE = ProbeConfig(lidar_images=6, lidar_views=3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return labelled_source(Path(tmp_path_factory.mktemp("images")) / "train")


def found(source: Source, *, labelled: bool, **changes: bool) -> Evaluation:
    result = evaluate(
        seeded_backbone(),
        (source, source) if labelled else None,
        source,
        [],
        title="step 0",
        crops=CROPS,
        config=eval_config().model_copy(update=changes),
        probe=PROBE,
        precision="fp32",
    )
    assert result is not None
    return result


def features(source: Source) -> Features:
    indices = np.arange(source.num_images)
    return embed_source(seeded_backbone(), source, indices, CROPS, eval_config(), precision="fp32")


def test_with_labels_there_are_accuracies_and_the_rank_of_the_voters(source: Source) -> None:
    scores = found(source, labelled=True).scores
    side = features(source)
    assert scores == knn_accuracy(side, side, eval_config()) | {"rankme": rankme(side.features)}


def test_without_labels_there_is_the_rank_alone_unless_it_is_switched_off(source: Source) -> None:
    assert found(source, labelled=False).scores == {"rankme": rankme(features(source).features)}
    assert found(source, labelled=False, label_free=False).scores == {}


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
    assert found(source, labelled=False).attention is None
