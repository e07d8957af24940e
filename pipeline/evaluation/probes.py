"""Probes of frozen features: a linear classifier, and three label-free probes. Pure functions.

Features [n, D] in, numbers out; there are no images, files or Ray here. Axes: n images, D feature, C classes,
R learning rates, q views of an image.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dinoray.models.errors import DataError
from dinoray.models.schedules import warmup_cosine
from dinoray.pipeline.evaluation.config import ProbeConfig

Rows = Tensor | NDArray[np.floating]


def rankme(features: Rows) -> float:
    """Return the effective rank of uncentred features [n, D] (RankMe, arXiv 2210.02885), in [1, min(n, D)].

    It is exp of the entropy of p_k = sigma_k / sum(sigma) + 1e-7 over the singular values sigma.
    """
    sigma = torch.linalg.svdvals(_doubles(features))
    return _exp_entropy(sigma, epsilon=1e-7)


def lidar(views: Rows, *, delta: float = 1e-4) -> float:
    """Return the effective rank of the features [n, q, D] that separate images (LiDAR, arXiv 2312.04000).

    It is exp of the entropy of p_k = lambda_k / sum(lambda) + 1e-8 over the eigenvalues lambda of Sw^-1/2 Sb
    Sw^-1/2. Sb is the covariance of the images' means. Sw is the covariance of views around these means plus
    delta I. Both are unbiased. Raises DataError for fewer than two images or views.
    """
    n, q, d = views.shape
    if n < 2 or q < 2:
        raise DataError(
            f"LiDAR needs two readable images and two views of each at least, not {n} and {q}; add images, or "
            "leave lidar out of --probes"
        )
    x = _doubles(views)
    means = x.mean(dim=1)
    within = (x - means[:, None]).flatten(0, 1)
    sw = within.T @ within / (n * (q - 1)) + delta * torch.eye(d, dtype=x.dtype, device=x.device)
    between = (means - means.mean(dim=0)).T / math.sqrt(n - 1)  # Sb = between @ between.T
    # With Sw = L L^T, the eigenvalues of L^-1 Sb L^-T are the same and never need Sb itself.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(sw), between, upper=False)
    eigenvalues = torch.linalg.svdvals(whitened) ** 2
    return _exp_entropy(F.pad(eigenvalues, (0, d - len(eigenvalues))), epsilon=1e-8)


def feature_std(features: Rows) -> float:
    """Return the mean over dimensions of std(z / |z|): 1/sqrt(D) for isotropic features, 0 at collapse."""
    return float(_unit_std(features).mean())


def collapsed_dims(features: Rows, *, threshold: float = 0.01) -> float:
    """Return the share of the D dimensions whose std of z / |z| is below `threshold` / sqrt(D)."""
    std = _unit_std(features)
    return float((std < threshold / math.sqrt(len(std))).double().mean())


class LinearScores(NamedTuple):
    """Accuracies in [0, 1] per learning rate; `best` is the index chosen on the held-out training images."""

    lrs: tuple[float, ...]
    holdout: tuple[float, ...]
    val: tuple[float, ...]
    best: int


def linear_probe(
    train: Rows,
    train_labels: Tensor,
    val: Rows,
    val_labels: Tensor,
    *,
    num_classes: int,
    config: ProbeConfig,
    device: str = "cpu",
) -> LinearScores:
    """Train linear classifiers on frozen features, one per learning rate, and score them on unseen images.

    The held-out share of the training features chooses the learning rate, so its accuracy on `val` is not the
    best of many. Raises DataError for fewer than two training features.
    """
    x, y = torch.as_tensor(train).float(), train_labels
    if len(x) < 2:
        raise DataError(
            f"a linear probe needs two labelled training images at least, not {len(x)}; add images, or leave linear "
            "out of --probes"
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(config.seed))
    cut = min(len(x) - 1, max(1, round(config.linear_holdout * len(x))))
    held, rest = order[:cut], order[cut:]
    heads = train_heads(x[rest], y[rest], num_classes=num_classes, config=config, device=device)
    holdout = _accuracies(heads, x[held], y[held])
    val_accuracies = _accuracies(heads, torch.as_tensor(val).float(), val_labels)
    best = max(range(len(holdout)), key=holdout.__getitem__)
    return LinearScores(config.linear_lrs, tuple(holdout), tuple(val_accuracies), best)


def train_heads(
    features: Tensor, labels: Tensor, *, num_classes: int, config: ProbeConfig, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Train R linear classifiers in one pass per epoch: weights [D, R, C] and biases [R, C], on `device`.

    SGD with momentum 0.9 and no weight decay, cosine to 0, peak lr * batch / 256. All classifiers start from
    the same weights and see the same batches, so each ends as if trained alone. Deterministic in
    `config.seed`.
    """
    x, y = features.to(device), labels.to(device)
    n, d, r = len(x), x.shape[1], len(config.linear_lrs)
    batch_size = min(config.linear_batch_size, n)
    generator = torch.Generator().manual_seed(config.seed)
    start = 0.01 * torch.randn(d, 1, num_classes, generator=generator)
    weights = start.repeat(1, r, 1).to(device)
    biases = torch.zeros(r, num_classes, device=device)
    momenta = [torch.zeros_like(weights), torch.zeros_like(biases)]
    peaks = torch.tensor(config.linear_lrs, device=device).view(r, 1) * batch_size / 256
    total_steps = config.linear_epochs * math.ceil(n / batch_size)
    step = 0
    for _ in range(config.linear_epochs):
        for rows in torch.randperm(n, generator=generator).to(device).split(batch_size):
            errors = _logits(x[rows], weights, biases).softmax(dim=-1)
            errors -= F.one_hot(y[rows], num_classes)[:, None]
            errors /= len(rows)  # d loss / d logits, [b, R, C]
            lr = peaks * warmup_cosine(step, base=1.0, final=0.0, total_steps=total_steps)
            grads = (x[rows].T @ errors.flatten(1)).view_as(weights), errors.sum(dim=0)
            for value, momentum, grad in zip((weights, biases), momenta, grads, strict=True):
                value.sub_(momentum.mul_(0.9).add_(grad) * lr)
            step += 1
    return weights, biases


def _logits(x: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """Map [b, D] to logits [b, R, C] by one matrix product."""
    return (x @ weights.flatten(1)).view(len(x), *biases.shape) + biases


def _accuracies(heads: tuple[Tensor, Tensor], features: Tensor, labels: Tensor) -> list[float]:
    """Return the share of correct answers per learning rate; non-finite logits count as wrong."""
    hits = torch.zeros(len(heads[1]), dtype=torch.long)
    for x, y in zip(features.split(4096), labels.split(4096), strict=True):
        logits = _logits(x.to(heads[0].device), *heads)
        right = (logits.argmax(dim=-1) == y.to(logits.device)[:, None]) & logits.isfinite().all(dim=-1)
        hits += right.sum(dim=0).cpu()
    return (hits / len(features)).tolist()


def _doubles(rows: Rows) -> Tensor:
    """Convert to float64; raise DataError if a value is not finite."""
    x = torch.as_tensor(rows).double()
    if not x.isfinite().all():
        raise DataError(
            "the features are not all finite: the checkpoint is damaged or its training diverged; choose another step"
        )
    return x


def _exp_entropy(values: Tensor, *, epsilon: float) -> float:
    p = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + epsilon
    return float((-(p * p.log()).sum()).exp())


def _unit_std(features: Rows) -> Tensor:
    return F.normalize(_doubles(features), dim=-1).std(dim=0, correction=0)
