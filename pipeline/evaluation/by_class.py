"""Results class by class: balanced accuracy, a table, confused pairs, and retrieval. Pure functions of numbers.

For people who ask which of their classes work. Axes: m queries (classified images), n bank (images that vote).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MAX_PAIRS = 10
RECALL_AT = (1, 5, 10)
"""Numbers of retrieved images for recall."""
_ROWS = 128
"""Queries that are ranked together."""

Labels = NDArray[np.int64]


def by_class(truth: Labels, guesses: Labels, bank: Labels, names: Sequence[str]) -> dict[str, Any]:
    """Return `balanced_accuracy`, `by_class` and `confusions` of guesses [m] for images with labels `truth` [m].

    Balanced accuracy is the mean over classes of their recall, so that each class counts alike. `by_class`: a row for
    each class with classified images, lowest recall first. `confusions`: the commonest pairs of a class and another
    one that its images are taken for. `bank` [n]: the labels of the voters.
    """
    num_train, num_val = Counter(bank.tolist()), Counter(truth.tolist())
    num_guessed, right = Counter(guesses.tolist()), Counter(truth[truth == guesses].tolist())
    rows: list[dict[str, Any]] = [
        {
            "class": names[label],
            "num_train": num_train[label],
            "num_val": number,
            "recall": right[label] / number,
            "precision": right[label] / num_guessed[label] if num_guessed[label] else None,
        }
        for label, number in num_val.items()
    ]
    pairs = Counter((t, g) for t, g in zip(truth.tolist(), guesses.tolist(), strict=True) if t != g)
    confusions = [
        {"class": names[t], "taken_for": names[g], "images": number, "share": number / num_val[t]}
        for (t, g), number in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:_MAX_PAIRS]
    ]
    rows.sort(key=lambda row: (row["recall"], row["class"]))
    balanced = sum(right[label] / number for label, number in num_val.items()) / len(num_val)
    return {"balanced_accuracy": balanced, "by_class": rows, "confusions": confusions}


class Retrieved(NamedTuple):
    """Sums over queries, which add up: average precisions, hits among the first k of `RECALL_AT`, and queries."""

    precision: float
    hits: tuple[int, ...]
    num_queries: int


def retrieve(queries: Tensor, truth: Tensor, bank: Tensor, bank_labels: Tensor) -> Retrieved:
    """Rank the bank [n, D] by cosine for each query [m, D], both of unit length; an image of its class is relevant.

    AP = mean over the relevant images of (relevant ones up to it) / (its rank). Recall at k: whether a relevant image
    is among the first k. Queries whose class the bank lacks are left out.
    """
    precision, hits, num_queries = 0.0, torch.zeros(len(RECALL_AT), dtype=torch.int64), 0
    for rows, labels in zip(queries.split(_ROWS), truth.split(_ROWS), strict=True):
        order = (rows @ bank.T).argsort(dim=1, descending=True, stable=True)
        relevant = bank_labels[order] == labels[:, None]
        relevant = relevant[relevant.any(dim=1)]
        found = relevant.cumsum(dim=1)
        ranks = torch.arange(1, relevant.shape[1] + 1)
        of_query = (found / ranks * relevant).sum(dim=1) / relevant.sum(dim=1)
        precision += float(of_query.double().sum())
        hits += torch.stack([relevant[:, :k].any(dim=1).sum() for k in RECALL_AT])
        num_queries += len(relevant)
    return Retrieved(precision, tuple(hits.tolist()), num_queries)


def retrieval(parts: Iterable[Retrieved]) -> dict[str, float]:
    """Return `retrieval_map` and `recall_at_1`, ... in [0, 1] of all queries together; nothing without queries."""
    precisions, hits, numbers = zip(*parts, strict=True)
    total = sum(numbers)
    if not total:
        return {}
    recalls = np.sum(hits, axis=0) / total
    found = {f"recall_at_{k}": float(recall) for k, recall in zip(RECALL_AT, recalls, strict=True)}
    return {"retrieval_map": sum(precisions) / total, **found}
