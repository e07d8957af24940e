"""Statistics of small samples: spread over seeds, variance explained by a setting.

Numbers in, numbers out; there are no trials here.
"""

import math
from collections.abc import Sequence

import numpy as np

from dinoray.pipeline.tracking.rankings import ranks_of


def student_t95(df: int) -> float:
    """Return Student's t such that the interval of +- t standard errors holds 90 %."""
    from scipy.special import stdtrit

    return float(stdtrit(df, 0.95))


def sample_std(values: Sequence[float]) -> float | None:
    """Return the standard deviation with n - 1; None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def pooled_std(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Return the common standard deviation within groups and its degrees of freedom; (0, 0) if undefined."""
    df = sum(len(group) - 1 for group in groups if len(group) > 1)
    squares = sum(float(np.var(group)) * len(group) for group in groups if len(group) > 1)
    return (math.sqrt(squares / df), df) if df else (0.0, 0)


def difference_margin(groups: Sequence[Sequence[float]], num_a: int, num_b: int) -> float:
    """Return half of the 90 % interval of the difference of two means over `num_a` and `num_b` values.

    The spread is pooled over all groups, because two to five seeds do not determine it alone. Infinite if no
    group has two values.
    """
    std, df = pooled_std(groups)
    return student_t95(df) * std * math.sqrt(1 / num_a + 1 / num_b) if df else math.inf


def explained(groups: Sequence[int], scores: Sequence[float]) -> float:
    """Return the share of the variance of the scores' ranks between groups: epsilon squared, 0 to 1.

    It is corrected for the number of groups, so that a setting without influence gives about 0 also in few
    trials.
    """
    ranks = ranks_of(np.asarray(scores, np.float64))
    labels = np.asarray(groups)
    present = np.unique(labels)
    total = float(((ranks - ranks.mean()) ** 2).sum())
    if total == 0 or not 1 < len(present) < len(ranks):
        return 0.0
    within = sum(float(((ranks[labels == g] - ranks[labels == g].mean()) ** 2).sum()) for g in present)
    return max(0.0, 1 - within / (len(ranks) - len(present)) / (total / (len(ranks) - 1)))


def chance_share(num: int) -> float:
    """Return the bound of `explained` in about 9 of 10 cases without influence, in `num` scores."""
    groups = num_groups(num)
    return (
        min(1.0, 1.645 * math.sqrt(2 * (groups - 1) / ((num - groups) * (num + 1)))) if num > groups else 1.0
    )


def num_groups(num: int) -> int:
    """Return the number of groups for `num` values."""
    return 3 if num < 16 else 4


def quantile_groups(places: Sequence[float]) -> list[int]:
    """Return group numbers for three groups of neighbours, four from 16 values on.

    Groups have about equal sizes; equal places stay together.
    """
    num = num_groups(len(places))
    return [min(num - 1, int(rank * num / len(places))) for rank in ranks_of(np.asarray(places, np.float64))]
