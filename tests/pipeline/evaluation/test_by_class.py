"""Results class by class, by hand and against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score

from dinoray.pipeline.evaluation.by_class import by_class, retrieval, retrieve

NAMES = ("cat", "dog", "owl", "elk")
BANK = np.array([0, 0, 0, 1, 1, 2, 3])
TRUTH = np.array([0, 0, 0, 0, 1, 1, 2, 2])
GUESSES = np.array([0, 0, 0, 1, 1, 0, 0, 0])


def test_the_table_is_counted_by_hand() -> None:
    found = by_class(TRUTH, GUESSES, BANK, NAMES)
    assert found["by_class"] == [
        {"class": "owl", "num_train": 1, "num_val": 2, "recall": 0.0, "precision": None},
        {"class": "dog", "num_train": 2, "num_val": 2, "recall": 0.5, "precision": 0.5},
        {"class": "cat", "num_train": 3, "num_val": 4, "recall": 0.75, "precision": 0.5},
    ]
    assert found["confusions"] == [
        {"class": "owl", "taken_for": "cat", "images": 2, "share": 1.0},
        {"class": "cat", "taken_for": "dog", "images": 1, "share": 0.25},
        {"class": "dog", "taken_for": "cat", "images": 1, "share": 0.5},
    ]
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(TRUTH, GUESSES))


def test_retrieval_is_scikit_learns_average_precision_in_any_blocks() -> None:
    rng = np.random.default_rng(0)
    queries, bank = (
        torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(n, 5))).float(), dim=-1)
        for n in (300, 90)
    )
    truth, labels = rng.integers(0, 5, 300), rng.integers(0, 4, 90)  # class 4 is in no image of the bank
    wanted, hits = [], []
    for query, label in zip(queries, truth, strict=True):
        relevant, scores = labels == label, (bank @ query).numpy()
        if relevant.any():
            wanted.append(average_precision_score(relevant, scores))
            hits.append([relevant[np.argsort(-scores)[:k]].any() for k in (1, 5, 10)])
    parts = [
        retrieve(queries[part], torch.from_numpy(truth[part]), bank, torch.from_numpy(labels))
        for part in (slice(0, 200), slice(200, 300))
    ]
    found = retrieval(parts)
    assert found["retrieval_map"] == pytest.approx(np.mean(wanted), rel=1e-5)
    assert [found[f"recall_at_{k}"] for k in (1, 5, 10)] == pytest.approx(np.mean(hits, axis=0))


def test_queries_without_images_of_their_class_have_no_retrieval() -> None:
    rows = torch.eye(2)
    assert retrieval([retrieve(rows, torch.tensor([1, 1]), rows, torch.tensor([0, 0]))]) == {}
