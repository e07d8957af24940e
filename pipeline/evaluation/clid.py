"""Cluster learnability and intrinsic dimension of features, which together are CLID. Pure functions.

From "Using Representation Expressiveness and Learnability to Evaluate Self-Supervised Learning Methods" (Lu et al.,
arXiv 2206.01251). Neither needs labels or augmented views. Features are good that spread images over many directions
(a high intrinsic dimension) and still form groups that a simple classifier learns (a high learnability). Each alone is
misled: equal features are perfectly learnable and have dimension 0, noise has a high dimension and nothing to learn.
K = sqrt(n) clusters, unit length, one neighbour and two halves are what public implementations take from the paper; the
sum of the two parts is in tracking/rankings.py, because it compares networks. There are no images, files or Ray
here. Axes: n images, D feature, K clusters.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoray.models.errors import DataError
from dinoray.pipeline.evaluation.probes import Rows

MIN_IMAGES = 5
"""Fewer images have no clusters, and no two neighbours each."""
MAX_IMAGES = 5000
"""Features beyond this number are thinned evenly: all pairs of images are compared."""
_ROUNDS = 25
"""Maximum number of rounds of k-means."""
_NUM_NEAR = 4
"""Neighbours whose distances are computed again in float64."""
_KEPT = 0.9
"""Share of the ratios that the fit uses, as in TwoNN: the largest 10 % are often not of the same dimension."""
_SAME = 1e-4
"""Images are copies if their distance is below this share of a median distance between neighbours."""
_BLOCK = 1024


def learnability_and_dimension(features: Rows) -> dict[str, float]:
    """Return `cluster_learnability` and `intrinsic_dim` of features [n, D], n >= `MIN_IMAGES`.

    Raises DataError for features that are not finite.
    """
    rows = torch.as_tensor(features)
    rows = rows[:: math.ceil(len(rows) / MAX_IMAGES)].float()
    if not rows.isfinite().all():
        raise DataError(
            "the features are not all finite: the checkpoint is damaged or its training diverged; choose another step"
        )
    return {"cluster_learnability": cluster_learnability(rows), "intrinsic_dim": intrinsic_dim(rows)}


def cluster_learnability(features: Tensor, *, seed: int = 0) -> float:
    """Return the accuracy, 0 to 1, with which the nearest neighbour of an image predicts its cluster.

    CL = 1 / |Q| * sum over q in Q of [c(nn(q)) = c(q)]: c is the cluster by k-means with K = sqrt(n) clusters on
    features of unit length [n, D]; Q is every second image, and nn(q) the nearest, by cosine, of the others.
    """
    x = F.normalize(features.float(), dim=-1)
    clusters = _kmeans(x, round(math.sqrt(len(x))), seed=seed)
    bank, queries = x[::2], x[1::2]
    nearest = torch.cat([(block @ bank.T).argmax(dim=1) for block in queries.split(_BLOCK)])
    return float((clusters[::2][nearest] == clusters[1::2]).double().mean())


def intrinsic_dim(features: Tensor) -> float:
    """Return the intrinsic dimension of features [n, D] by TwoNN (Facco et al., arXiv 1803.06992).

    With the distances r1 <= r2 of an image to its two nearest, mu = r2 / r1 has the distribution F(mu) = 1 - mu^-d.
    d is the slope of -ln(1 - F) over ln mu, through the origin, with F = i / n for the i-th smallest mu; the largest
    10 % are left out. Of copies of an image (r1 = 0) one counts; 0 if there are not three different images.
    """
    x = features.float()
    distances, neighbours = _two_nearest(x)
    is_copy = (distances[:, 0] <= _SAME * float(distances[:, 1].median())) | (distances[:, 0] == 0)
    is_later = neighbours < torch.arange(len(x))
    if (is_copy & is_later).any():
        x = x[~(is_copy & is_later)]
        if len(x) < 3:
            return 0.0
        distances = _two_nearest(x).distances
    distances = distances[distances[:, 0] > 0]
    log_mu = (distances[:, 1] / distances[:, 0]).log().sort().values
    kept = math.floor(_KEPT * len(log_mu))
    x = log_mu[:kept]
    y = -torch.log1p(-torch.arange(1, kept + 1, dtype=torch.float64) / len(log_mu))
    squares = float(x @ x)
    return float(x @ y) / squares if squares else 0.0


class _Nearest(NamedTuple):
    """Of each row: the Euclidean distances to its two nearest, float64 [n, 2], and the number of the nearest, [n]."""

    distances: Tensor
    neighbours: Tensor


def _two_nearest(x: Tensor) -> _Nearest:
    squares = (x * x).sum(dim=1)
    distances, neighbours = [], []
    for first in range(0, len(x), _BLOCK):
        block = x[first : first + _BLOCK]
        # Without the row's own square, which does not change the order. Products are fast but rounded: a few
        # candidates are found by them and measured exactly.
        order = squares - 2 * block @ x.T
        own = torch.arange(len(block))
        order[own, first + own] = math.inf
        near = order.topk(min(_NUM_NEAR, len(x) - 1), largest=False).indices
        exact, order = (block[:, None].double() - x[near].double()).norm(dim=-1).sort(dim=1)
        distances.append(exact[:, :2])
        neighbours.append(near.gather(1, order[:, :1])[:, 0])
    return _Nearest(torch.cat(distances), torch.cat(neighbours))


def _kmeans(x: Tensor, num_clusters: int, *, seed: int) -> Tensor:
    """Return the clusters int64 [n] of rows of unit length [n, D] by spherical k-means from k-means++ centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = x[torch.randint(len(x), (1,), generator=generator)]
    apart = (2 - 2 * x @ centres[0]).clamp(min=0)
    for _ in range(num_clusters - 1):
        if not apart.any():  # fewer different features than clusters
            break
        centres = torch.cat([centres, x[torch.multinomial(apart, 1, generator=generator)]])
        apart = torch.minimum(apart, (2 - 2 * x @ centres[-1]).clamp(min=0))
    clusters = (x @ centres.T).argmax(dim=1)
    for _ in range(_ROUNDS):
        sums = torch.zeros_like(centres).index_add_(0, clusters, x)
        is_empty = torch.bincount(clusters, minlength=len(centres)) == 0
        centres = torch.where(is_empty[:, None], centres, F.normalize(sums, dim=-1))
        before, clusters = clusters, (x @ centres.T).argmax(dim=1)
        if torch.equal(before, clusters):
            break
    return clusters
