"""Rankings of networks by their metrics: how far two of them agree, and CLID, a ranking by two. No files here."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
CLID = ("cluster_learnability", "intrinsic_dim")
"""The parts of CLID, as evaluations log them."""


def kendall(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Kendall's tau-b of two rankings of the same items, -1 to 1; None if a ranking has only ties.

    It is the number of pairs in the same order minus pairs in the opposite order. The divisor is the
    geometric mean of the numbers of pairs that each ranking separates. Infinities are values; NaN is left out.
    """
    from scipy.stats import kendalltau  # takes a second

    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    known = ~(np.isnan(a) | np.isnan(b))
    if known.sum() < 2:
        return None
    tau = float(kendalltau(ranks_of(a[known]), ranks_of(b[known])).statistic)
    return None if math.isnan(tau) else tau


def chance_tau(num: int) -> float:
    """Return the bound of |tau| for 9 of 10 pairs of unrelated rankings of `num` items.

    Normal approximation.
    """
    return min(1.0, 1.645 * math.sqrt(2 * (2 * num + 5) / (9 * num * (num - 1)))) if num > 1 else 1.0


def ranks_of(values: Floats) -> Floats:
    """Return ranks from 0; equal values get the mean of their ranks."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(values), np.float64) - 1


def clid(learnability: Sequence[float], dimension: Sequence[float]) -> list[float]:
    """Return CLID of networks that are compared: the sum of their cluster learnability and intrinsic dimension.

    Each is scaled to mean 0 and standard deviation 1 over the networks (Lu et al., arXiv 2206.01251), so CLID has a
    meaning only among them: larger is better, and 0 is their mean. A part that is equal for all adds nothing.
    """
    total = np.zeros(len(learnability))
    for part in (learnability, dimension):
        values = np.asarray(part, np.float64)
        spread = values.std() if len(values) else 0.0
        total += (values - values.mean()) / spread if spread > 0 else 0.0
    return [float(value) for value in total]
