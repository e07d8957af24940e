"""Filters for RGB become filters for other channels by one rule."""

import torch

from dinoray.models.input_channels import inflate


def test_inflated_filters_are_those_of_a_table_by_hand() -> None:
    """Filters 1, 2 and 6 of red, green and blue; their mean is 3."""
    filters = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
    found = {n: inflate(filters, n).flatten().tolist() for n in (1, 2, 3, 4, 6)}
    assert found == {
        1: [9.0],
        2: [4.5, 4.5],
        3: [1.0, 2.0, 6.0],
        4: [0.75, 1.5, 4.5, 2.25],
        6: [0.5, 1.0, 3.0, 1.5, 1.5, 1.5],
    }
