"""Memory of crops is used again, and never while anything still refers to it."""

import numpy as np
import pytest
from ray.data.block import BlockAccessor

from dinoray.pipeline.augment.augmenter import BufferPool


def address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def test_memory_that_nobody_refers_to_is_handed_out_again() -> None:
    memory = BufferPool()
    first = address(memory.take(6000))
    assert address(memory.take(6000)) == first


@pytest.mark.parametrize("kind", ["array", "view", "Arrow block"])
def test_memory_is_not_handed_out_while_something_refers_to_it(kind: str) -> None:
    memory = BufferPool()
    array = memory.take(6000)
    first = address(array)
    views = {"crops": array[:3000].reshape(10, 300), "more": array[3000:].reshape(10, 300)}
    held = {"array": array, "view": views["more"], "Arrow block": BlockAccessor.batch_to_arrow_block(views)}[
        kind
    ]
    del array, views
    other = memory.take(6000)
    assert address(other) != first
    second = address(other)
    del held, other
    both = memory.take(6000), memory.take(6000)  # free now, so that nothing new is made
    assert {address(array) for array in both} == {first, second}


def test_free_memory_of_another_size_is_let_go() -> None:
    memory = BufferPool()
    in_use = memory.take(6000)
    memory.take(3000)
    memory.take(5)
    assert [len(array) for array in memory._arrays] == [6000, 5]
    assert len(in_use) == 6000
