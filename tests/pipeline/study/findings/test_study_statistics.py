"""The statistics of a study: rank correlation, the spread between seeds, and what a setting explains."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoray.pipeline.study.findings.statistics import (
    difference_margin,
    explained,
    pooled_std,
    quantile_groups,
    student_t95,
)
from dinoray.pipeline.tracking.rankings import chance_tau, kendall


def slow_kendall(x: list[float], y: list[float]) -> float | None:
    """Pair by pair, as the definition reads."""
    agree = told_x = told_y = 0
    for i in range(len(x)):
        for j in range(i):
            first, second = (x[i] > x[j]) - (x[i] < x[j]), (y[i] > y[j]) - (y[i] < y[j])
            agree += first * second
            told_x += first != 0
            told_y += second != 0
    return agree / math.sqrt(told_x * told_y) if told_x and told_y else None


RANKS = st.sampled_from([-math.inf, 0.0, 1.0, 2.0, 3.5, math.inf])


@given(st.lists(st.tuples(RANKS, RANKS), max_size=12))
def test_kendall_is_what_counting_pairs_gives(pairs: list[tuple[float, float]]) -> None:
    x, y = [a for a, _ in pairs], [b for _, b in pairs]
    expected = slow_kendall(x, y)
    assert kendall(x, y) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("x", "y", "tau"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3], [1, 3, 2], 1 / 3),
        ([1, 1, 2, 3], [1, 2, 3, 4], 5 / math.sqrt(5 * 6)),  # the tie is told apart by y alone
        ([1, 1, 1], [1, 2, 3], None),
        ([1], [1], None),
        ([], [], None),
        ([1, 2, math.nan], [1, 2, 0], 1.0),
    ],
)
def test_kendall_of_known_rankings(x: list[float], y: list[float], tau: float | None) -> None:
    assert kendall(x, y) == (None if tau is None else pytest.approx(tau))


def test_chance_agreement_is_what_unrelated_rankings_show() -> None:
    rng = np.random.default_rng(0)
    taus = [kendall(rng.permutation(12), rng.permutation(12)) for _ in range(2000)]
    assert np.quantile(np.abs(np.array(taus, float)), 0.9) == pytest.approx(chance_tau(12), abs=0.04)
    assert chance_tau(1) == chance_tau(2) == 1.0


@pytest.mark.parametrize(
    ("df", "t"), [(1, 6.314), (4, 2.132), (10, 1.812), (12, 1.782), (20, 1.725), (60, 1.671), (10_000, 1.645)]
)
def test_student_t_is_that_of_the_tables(df: int, t: float) -> None:
    assert student_t95(df) == pytest.approx(t, abs=2e-3)


def test_the_spread_is_pooled_over_what_was_rerun() -> None:
    # Squares around the means: 2 and 8 + 0 + 8 = 16, over (2 - 1) + (3 - 1) degrees; the single one adds nothing.
    assert pooled_std([[1, 3], [0, 4, 8], [100]]) == (pytest.approx(math.sqrt((2 + 32) / 3)), 3)
    assert pooled_std([[1], [2]]) == (0.0, 0)
    assert difference_margin([[1], [2]], 1, 1) == math.inf


def test_a_setting_explains_what_lies_between_its_groups() -> None:
    assert explained([0, 0, 1, 1], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(1 - (1 / 2) / (5 / 3))
    assert explained([0, 1, 0, 1], [1.0, 2.0, 3.0, 4.0]) == 0.0
    assert explained([0, 0, 0], [1.0, 2.0, 3.0]) == 0.0
    assert explained([0, 0, 1, 1], [5.0] * 4) == 0.0
    assert quantile_groups([0.9, 0.1, 0.5, 0.2, 0.6, 0.8]) == [2, 0, 1, 0, 1, 2]
