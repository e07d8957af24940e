"""Weighted k-NN accuracy of features, as in DINO's evaluation. Pure functions; no images, files or Ray here."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dinoray.models.errors import DataError
from dinoray.pipeline.evaluation.by_class import Retrieved, by_class, retrieval, retrieve
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.features import Features


def knn_vote(
    similarity: Tensor, bank_labels: Tensor, *, ks: Sequence[int], temperature: float, num_classes: int
) -> Tensor:
    """Classify by weighted k-NN for each k: cosines [m, n] to a bank with labels [n] -> labels [len(ks), m].

    Each of the k nearest neighbours votes for its label with exp(cosine / temperature); the first label wins
    a tie. A k beyond the bank's size means the whole bank.
    """
    cosine, nearest = similarity.topk(min(max(ks), similarity.shape[1]), dim=-1)
    labels = bank_labels[nearest]
    # Relative to the nearest neighbour: the same votes up to a factor, without overflow at small
    # temperatures.
    weights = ((cosine - cosine[:, :1]) / temperature).exp()
    guesses = []
    for k in ks:
        votes = torch.zeros(len(similarity), num_classes, device=similarity.device)
        guesses.append(votes.scatter_add_(1, labels[:, :k], weights[:, :k]).argmax(dim=-1))
    return torch.stack(guesses)


@dataclass(frozen=True)
class KnnProblem:
    """k-NN in blocks of queries that can be counted anywhere, in any order, with the same result.

    Rows are float32 of unit length: the voters' `bank` [n, D] with int64 labels [n], and the `queries` [m, D]
    with their true labels [m]. All are arrays, which tasks on one node share.
    """

    bank: NDArray[np.float32]
    bank_labels: NDArray[np.int64]
    queries: NDArray[np.float32]
    truth: NDArray[np.int64]
    num_classes: int
    config: EvalConfig

    @classmethod
    def of(cls, train: Features, val: Features, config: EvalConfig) -> "KnnProblem":
        """Build the problem from two sets of features. Raises DataError if a set has no readable image."""
        classes = class_numbers(train, val)

        def side(features: Features) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
            rows = F.normalize(torch.from_numpy(features.features), dim=-1)
            return rows.numpy(), np.array([classes[label] for label in features.labels], np.int64)

        return cls(*side(train), *side(val), len(classes), config)

    @property
    def blocks(self) -> list[int]:
        """Return the first query of each block."""
        return list(range(0, len(self.queries), self._block_size))

    @property
    def _block_size(self) -> int:
        return max(1, min(1024, (1 << 27) // len(self.bank)))  # at most 512 MiB of cosines

    def hits(self, block: int) -> list[int]:
        """Return the correct answers per k among the queries of the block that starts at `block`."""
        return (self.guesses(block) == self._truth(block)).sum(dim=1).tolist()

    def guesses(self, block: int) -> Tensor:
        """Return the labels by k-NN, int64 [len(k), b], of the queries of the block that starts at `block`."""
        part = slice(block, block + self._block_size)
        return knn_vote(
            torch.from_numpy(self.queries[part] @ self.bank.T),
            torch.tensor(self.bank_labels),
            ks=self.config.k,
            temperature=self.config.temperature,
            num_classes=self.num_classes,
        )

    def answers(self, block: int) -> "Answers":
        """Return the guesses of a block, and what its queries retrieve from the bank."""
        part = slice(block, block + self._block_size)
        rows = [
            torch.tensor(rows) for rows in (self.queries[part], self.truth[part], self.bank, self.bank_labels)
        ]
        return Answers(self.guesses(block).numpy(), retrieve(*rows))

    def _truth(self, block: int) -> Tensor:
        return torch.tensor(self.truth[block : block + self._block_size])

    def scores(self, hits: Iterable[Sequence[int]]) -> dict[str, float]:
        """Return top-1 accuracy per k (`knn_10`, ...) in [0, 1]; `majority` always guesses one label.

        That label is the commonest voter label.
        """
        totals = np.sum(list(hits), axis=0)
        scores = {f"knn_{k}": int(n) / len(self.truth) for k, n in zip(self.config.k, totals, strict=True)}
        commonest = Counter(self.bank_labels.tolist()).most_common(1)[0][0]
        return scores | {"majority": int((self.truth == commonest).sum()) / len(self.truth)}


class Answers(NamedTuple):
    """Of a block of queries: the labels by k-NN for each k, int64 [len(k), b], and the sums of retrieval."""

    guesses: NDArray[np.int64]
    retrieved: Retrieved


def detailed_scores(
    problem: KnnProblem, answers: Sequence[Answers], classes: Mapping[str, int]
) -> dict[str, Any]:
    """Return the `scores` of a problem from the answers to all its blocks, in order; by class; and of retrieval.

    By class at the largest k, as in the report.
    """
    guesses = np.concatenate([answer.guesses for answer in answers], axis=1)
    largest = guesses[int(np.argmax(problem.config.k))]
    return {
        **problem.scores([(guesses == problem.truth).sum(axis=1).tolist()]),
        **by_class(problem.truth, largest, problem.bank_labels, list(classes)),
        **retrieval(answer.retrieved for answer in answers),
    }


def class_numbers(train: Features, val: Features) -> dict[str, int]:
    """Number labels in order of appearance, voters first. Raises DataError if a set is empty."""
    for side, features in (("eval.train_path", train), ("eval.val_path", val)):
        if not features.labels:
            raise DataError(
                f"{side} has no readable labelled image ({features.num_bad} unreadable); set it to labelled images"
            )
    return {name: i for i, name in enumerate(dict.fromkeys(train.labels + val.labels))}


def knn_accuracy(train: Features, val: Features, config: EvalConfig) -> dict[str, float]:
    """Compute the scores of a `KnnProblem` in this process.

    A class that only the val set has counts as wrong.
    """
    problem = KnnProblem.of(train, val, config)
    return problem.scores(problem.hits(block) for block in problem.blocks)
