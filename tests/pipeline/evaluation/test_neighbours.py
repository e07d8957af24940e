"""Neighbours of images, checked by hand: points on a circle, named by their degrees."""

import numpy as np
import pytest

from dinoray.pipeline.evaluation.features import Features
from dinoray.pipeline.evaluation.neighbours import change, chosen_queries, nearest, same_label


def at(*degrees: float, labels: str = "") -> Features:
    """Images 0, 1, ... whose features point there, each of another length; a letter of `labels` each."""
    angles = np.deg2rad(degrees)
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.arange(1, len(degrees) + 1)[:, None]
    indices = np.arange(len(degrees))
    return Features(rows.astype(np.float32), [*labels] or [""] * len(degrees), 0, indices)


def test_the_nearest_images_have_the_largest_cosines() -> None:
    found = nearest(at(0, 100), at(90, 45, 10), is_same=False, k=2)
    assert found.rows.tolist() == [[2, 1], [0, 1]]
    np.testing.assert_allclose(found.cosines, np.cos(np.deg2rad([[10, 45], [10, 55]])), atol=1e-6)


def test_an_image_is_no_neighbour_of_its_own() -> None:
    images = at(0, 1, 50, 52)
    found = nearest(images, images, is_same=True, k=1)
    assert found.rows[:, 0].tolist() == [1, 0, 3, 2]
    queries = images.only(np.array([2]))  # row 0 of the queries, row 2 of the bank
    assert nearest(queries, images, is_same=True, k=9).rows.tolist() == [[3, 1, 0]]


def test_a_change_counts_new_neighbours_and_where_they_were() -> None:
    before, after = (at(0), at(1, 2, 3, 4)), (at(0), at(4, 3, 2, 1))
    first, then = (nearest(*sides, is_same=False, k=2) for sides in (before, after))
    assert (first.rows.tolist(), then.rows.tolist()) == ([[0, 1]], [[3, 2]])
    found = change(before, first, then, is_same=False)
    assert found.num_new.tolist() == [2]
    assert found.places.tolist() == pytest.approx([12**0.5])  # the fourth and the third
    same = change(before, first, first, is_same=False)
    assert (same.num_new.tolist(), same.places.tolist()) == ([0], pytest.approx([2**0.5]))


def test_queries_are_a_fixed_sample_and_the_most_changed_of_the_others() -> None:
    before, after = (at(0, 0, 0, 0), at(1, 2, 3, 4)), (at(0, 180, 0, 0), at(1, 2, 3, 4))
    first, then = (nearest(*sides, is_same=False, k=2) for sides in (before, after))
    changed = change(before, first, then, is_same=False)
    sample, moved = chosen_queries(changed, 4, each=1)
    assert sample.tolist() == chosen_queries(None, 4, each=1)[0].tolist() != [1]
    assert moved.tolist() == [1]  # no other has changed
    everything, none = chosen_queries(changed, 4, each=9)
    assert (everything.tolist(), none.tolist()) == ([0, 1, 2, 3], [])


def test_neighbours_are_right_where_all_images_have_labels() -> None:
    queries, bank = at(0, 90, labels="ab"), at(1, 2, 89, labels="aba")
    found = nearest(queries, bank, is_same=False, k=2)
    right = same_label(queries, bank, found)
    assert right is not None
    assert right.tolist() == [[True, False], [False, True]]
    assert same_label(at(0, 90), bank, found) is None
