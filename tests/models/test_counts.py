"""A number with its noun."""

import pytest

from dinoray.models.counts import count


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 steps"), (1, "1 step"), (1.0, "1 step"), (12_000.0, "12,000 steps")]
)
def test_a_count_has_its_plural_and_separators(number: float, text: str) -> None:
    assert count(number, "step") == text
