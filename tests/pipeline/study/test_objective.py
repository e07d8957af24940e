"""By what trials are ranked: labels before ranks, the loss only where it can, and a reason that says so."""

import math

import pytest

from dinoray.models.errors import ConfigError
from dinoray.pipeline.study.objective import Objective, choose

TEMPS = ["loss.teacher_temp", "loss.center_momentum"]


def test_labels_decide_where_there_are_any() -> None:
    assert choose("auto", keys=TEMPS, labelled=True, k=20).metric == "knn_20"
    assert choose("auto", keys=["optim.base_lr"], labelled=True, k=10).metric == "knn_10"


def test_without_labels_rankme_ranks_temperatures_and_lidar_what_misleads_it() -> None:
    assert choose("auto", keys=TEMPS, labelled=False, k=20).metric == "rankme"
    found = choose("auto", keys=[*TEMPS, "optim.base_lr"], labelled=False, k=20)
    assert found.metric == "lidar"
    assert "optim.base_lr varies" in found.reason
    assert choose("auto", keys=["crops.hue"], labelled=False, k=20).metric == "lidar"


@pytest.mark.parametrize(
    "key", ["loss.teacher_temp", "loss.student_temp", "head.out_dim", "loss.koleo_weight"]
)
def test_the_loss_is_refused_with_an_explanation_where_what_varies_is_part_of_it(key: str) -> None:
    with pytest.raises(ConfigError) as error:
        choose("loss", keys=["optim.base_lr", key], labelled=True, k=20)
    assert key in str(error.value)
    assert "optim.base_lr" not in str(error.value)
    assert "entropy + KL" in str(error.value)
    assert "tune.objective=knn" in str(error.value)


def test_the_loss_ranks_what_does_not_move_it_and_less_is_better() -> None:
    loss = choose("loss", keys=["optim.base_lr", "loss.center_momentum"], labelled=False, k=20)
    assert loss.score({"loss": 3.0}) == -3.0
    assert loss.worst(64) == pytest.approx(-math.log(64))


def test_knn_without_labels_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"eval\.val_path.*tune\.objective=rankme"):
        choose("knn", keys=TEMPS, labelled=False, k=20)


def test_a_metric_that_is_missing_or_no_number_is_no_score() -> None:
    knn = Objective("knn_20", "")
    assert knn.score({"knn_20": 0.4, "loss": 1.0}) == 0.4
    assert knn.score({"loss": 1.0}) is None
    assert knn.score({"knn_20": math.nan}) is None


@pytest.mark.parametrize(("metric", "worst"), [("knn_20", 0.0), ("rankme", 1.0), ("lidar", 1.0)])
def test_a_collapse_scores_below_anything_that_learnt(metric: str, worst: float) -> None:
    assert Objective(metric, "").worst(1024) == worst
