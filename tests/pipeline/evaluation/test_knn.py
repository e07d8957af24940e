"""The vote is the one that a loop over distances gives."""

import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import nearest_vote

from dinoray.models.errors import DataError
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.features import (
    Features,
)
from dinoray.pipeline.evaluation.knn import KnnProblem, knn_accuracy, knn_vote


def features(rows: Sequence[Sequence[float]], labels: str | Sequence[str], *, num_bad: int = 0) -> Features:
    return Features(np.array(rows, np.float32).reshape(len(labels), -1), list(labels), num_bad)


def knn_classify(
    bank: torch.Tensor,
    labels: torch.Tensor,
    queries: torch.Tensor,
    *,
    k: int,
    temperature: float,
    num_classes: int,
) -> torch.Tensor:
    similarity = F.normalize(queries, dim=-1) @ F.normalize(bank, dim=-1).T
    return knn_vote(similarity, labels, ks=(k,), temperature=temperature, num_classes=num_classes)[0]


@given(
    num_voters=st.integers(1, 30),
    num_queries=st.integers(1, 6),
    num_classes=st.integers(1, 5),
    k=st.integers(1, 40),
    temperature=st.sampled_from([0.02, 0.07, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_votes_equal_those_counted_one_by_one(
    num_voters: int, num_queries: int, num_classes: int, k: int, temperature: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    bank = rng.normal(size=(num_voters, 4)).astype(np.float32) * rng.uniform(0.1, 10)
    labels = rng.integers(0, num_classes, num_voters)
    queries = rng.normal(size=(num_queries, 4)).astype(np.float32)
    ours = knn_classify(
        torch.from_numpy(bank),
        torch.from_numpy(labels),
        torch.from_numpy(queries),
        k=k,
        temperature=temperature,
        num_classes=num_classes,
    )
    theirs = [nearest_vote(bank, labels.tolist(), q, k=k, temperature=temperature) for q in queries]
    assert ours.tolist() == theirs


def test_the_temperature_decides_between_one_near_and_two_farther_voters() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])  # cosines 1, 0.8 and 0.8 with the query
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[3.0, 0.0]])

    def guess(temperature: float, k: int = 3) -> int:
        return int(knn_classify(bank, labels, query, k=k, temperature=temperature, num_classes=2))

    assert guess(0.07) == 0  # exp(0.2 / 0.07) = 17 times the vote
    assert guess(1.0) == 1  # exp(0.2) = 1.2 times the vote, of which there are two
    assert guess(1.0, k=1) == 0


def test_a_small_temperature_does_not_overflow() -> None:
    bank = torch.tensor([[0.8, 0.6], [1.0, 0.0]])
    guess = knn_classify(
        bank, torch.tensor([0, 1]), torch.tensor([[1.0, 0.0]]), k=2, temperature=0.005, num_classes=2
    )
    assert guess.tolist() == [1]


def test_equal_votes_go_to_the_label_that_was_seen_first() -> None:
    train = features([[1, 0], [1, 0]], "ba")
    assert knn_accuracy(train, features([[1, 0]], "b"), EvalConfig(k=(2,)))["knn_2"] == 1
    assert knn_accuracy(train, features([[1, 0]], "a"), EvalConfig(k=(2,)))["knn_2"] == 0


def test_accuracy_is_the_share_of_right_guesses_per_k() -> None:
    train = features([[1, 0], [1, 0.1], [0, 1]], "aab")
    val = features([[1, 0], [0, 1], [0.1, 1], [1, 0]], "abba")
    scores = knn_accuracy(train, val, EvalConfig(k=(1, 3), temperature=1e6))
    # With all three voting alike, every query is an a.
    assert scores == {"knn_1": 1.0, "knn_3": 0.5, "majority": 0.5}


def test_a_class_that_only_the_classified_images_have_counts_as_wrong() -> None:
    scores = knn_accuracy(features([[1], [1]], "aa"), features([[1], [1]], "ab"), EvalConfig(k=(1,)))
    assert scores == {"knn_1": 0.5, "majority": 0.5}


def test_the_majority_is_that_of_the_voters() -> None:
    scores = knn_accuracy(features([[1]] * 3, "aab"), features([[1]] * 4, "abbb"), EvalConfig(k=(1,)))
    assert scores["majority"] == 0.25


def test_one_voter_and_one_image_are_enough() -> None:
    assert knn_accuracy(features([[2.0]], "a"), features([[1.0]], "a"), EvalConfig()) == {
        "knn_10": 1.0,
        "knn_20": 1.0,
        "majority": 1.0,
    }


def test_more_images_than_fit_one_block_are_all_classified() -> None:
    angles = np.linspace(0, 1.5, 2500)
    rows = np.stack([np.cos(angles), np.sin(angles)], 1)
    labels = ["low" if angle < 0.75 else "high" for angle in angles]
    val = Features(rows.astype(np.float32), labels, 0)
    assert (
        knn_accuracy(features([[1, 0], [0.07, 1]], ["low", "high"]), val, EvalConfig(k=(1,)))["knn_1"] > 0.99
    )


def test_blocks_counted_elsewhere_and_in_any_order_give_the_same_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(KnnProblem, "_block_size", 7)
    rng = np.random.default_rng(0)
    train, val = (
        Features(rng.normal(size=(n, 3)).astype(np.float32), [str(x) for x in rng.integers(0, 4, n)], 0)
        for n in (60, 50)
    )
    config = EvalConfig(k=(1, 5, 20))
    problem = KnnProblem.of(train, val, config)
    assert problem.blocks == [0, 7, 14, 21, 28, 35, 42, 49]
    elsewhere = [pickle.loads(pickle.dumps(problem)).hits(block) for block in reversed(problem.blocks)]
    assert problem.scores(elsewhere) == knn_accuracy(train, val, config)
    for k in config.k:  # and they are those of the loop over distances
        hits = sum(
            nearest_vote(train.features, train.labels, query, k=k, temperature=0.07) == label
            for query, label in zip(val.features, val.labels, strict=True)
        )
        assert problem.scores(elsewhere)[f"knn_{k}"] == hits / 50


def test_a_large_bank_is_met_by_few_queries_at_once() -> None:
    one = np.zeros((1, 1), np.float32)
    few = KnnProblem(np.zeros((10, 1), np.float32), one[0], np.zeros((3000, 1)), one[0], 1, EvalConfig())
    many = KnnProblem(np.broadcast_to(one, (1 << 25, 1)), one[0], np.zeros((10, 1)), one[0], 1, EvalConfig())
    assert few.blocks == [0, 1024, 2048]
    assert many.blocks == [0, 4, 8]


@pytest.mark.parametrize("side", ["train", "val"])
def test_a_side_without_readable_images_is_named(side: str) -> None:
    some, none = features([[1.0]], "a"), Features(np.empty((0, 0), np.float32), [], 3)
    sides = (none, some) if side == "train" else (some, none)
    with pytest.raises(
        DataError, match=rf"eval\.{side}_path has no readable .* \(3 unreadable\); set it to labelled images$"
    ):
        knn_accuracy(*sides, EvalConfig())
    knn_accuracy(some, some, EvalConfig(k=(1,)))


@pytest.mark.parametrize("k", [(), (0,), (10, -1)])
def test_numbers_of_neighbours_that_cannot_vote_are_refused(k: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="k"):
        EvalConfig(k=k)
