"""Staging on a CPU: the thread, its bounds and its end are those of a GPU; a copy to the device is one in memory."""

import contextlib
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import NUM_IMAGES, tiny_batch, tiny_config

from dinoray.models.errors import DataError
from dinoray.pipeline.data.partition import lay_out
from dinoray.pipeline.stream.ray_data import in_step
from dinoray.pipeline.training import step
from dinoray.pipeline.training.staging import DEPTH, DEVICE_COLUMNS, STAGED_BYTES, Staging, _staged, staged
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.step import train

CPU = torch.device("cpu")
CONFIG = tiny_config()


def read_only(seed: int) -> dict[str, Any]:
    """A batch as the store has it."""
    batch = tiny_batch(CONFIG, seed=seed)
    for column in batch.values():
        column.flags.writeable = False
    return batch


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dinoray-staging"]


def settled(is_so: Any) -> bool:
    """Whether it becomes so, in seconds, or later where the machine has much to do."""
    end = time.monotonic() + 120
    while not is_so() and time.monotonic() < end:
        time.sleep(0.002)
    return bool(is_so())


@pytest.fixture(autouse=True)
def _leave_no_thread() -> Iterator[None]:
    yield
    assert threads() == []


@given(num_batches=st.integers(0, 7))
def test_batches_arrive_in_order_with_all_their_columns(num_batches: int) -> None:
    sent = [read_only(seed) for seed in range(num_batches)]
    found = list(Staging(sent, CPU))
    assert len(found) == num_batches
    for batch, ours in zip(sent, found, strict=True):
        assert set(ours) == {*batch, STAGED_BYTES}
        for name, column in batch.items():
            assert isinstance(ours[name], torch.Tensor if name in DEVICE_COLUMNS else np.ndarray)
            assert np.array_equal(np.asarray(ours[name]), column)


def test_a_staged_batch_is_not_overwritten_by_those_after_it() -> None:
    kept = [batch["global_crops"] for batch in Staging((read_only(seed) for seed in range(9)), CPU)]
    for seed, crops in enumerate(kept):
        assert np.array_equal(crops.numpy(), read_only(seed)["global_crops"])


def test_the_store_can_release_a_batch_once_it_is_copied() -> None:
    alive: list[weakref.ref[Any]] = []

    def stream() -> Iterator[dict[str, Any]]:
        for seed in count():
            held = [read_only(seed)]
            alive.append(weakref.ref(held[0]["global_crops"]))
            yield held.pop()

    with contextlib.closing(Staging(stream(), CPU)):  # nobody takes one
        assert settled(lambda: len(alive) == DEPTH and not any(ref() is not None for ref in alive))


def test_no_batch_is_held_while_the_next_one_is_awaited() -> None:
    alive: list[weakref.ref[Any]] = []

    def stream() -> Iterator[dict[str, Any]]:
        held = [read_only(0)]
        alive.append(weakref.ref(held[0]["global_crops"]))
        yield held.pop()
        alive.append(alive[0]())  # type: ignore[arg-type]
        yield read_only(1)

    layout = lay_out(range(2), world_size=1, global_batch_size=4, image_bytes=1, block_bytes=4)
    assert len(list(Staging(in_step(stream(), layout, rank=0), CPU))) == 2
    assert alive[1] is None


def test_no_more_than_its_depth_is_pulled_ahead_of_the_step() -> None:
    pulled: list[int] = []

    def stream() -> Iterator[dict[str, Any]]:
        for seed in count():
            pulled.append(seed)
            yield read_only(seed)

    crops = sum(column.nbytes for name, column in read_only(0).items() if name in DEVICE_COLUMNS)
    with contextlib.closing(Staging(stream(), CPU)) as staging:
        for taken in range(4):
            assert settled(lambda taken=taken: len(pulled) == taken + DEPTH)
            time.sleep(0.02)
            assert len(pulled) == taken + DEPTH
            assert 0 <= next(staging)[STAGED_BYTES] <= (DEPTH - 1) * crops


def test_an_error_of_the_stream_comes_out_unchanged_after_the_batches_before_it() -> None:
    error = DataError("s3://photos: gone")

    def stream() -> Iterator[dict[str, Any]]:
        yield from (read_only(0), read_only(1))
        raise error

    staging = Staging(stream(), CPU)
    assert [int(next(staging)["position"][0]) for _ in range(2)] == [0, 4]
    with pytest.raises(DataError) as raised:
        next(staging)
    assert raised.value is error
    assert list(staging) == []


def test_the_stream_is_closed_by_the_thread_that_runs_it() -> None:
    closed_by: list[str] = []

    def stream() -> Iterator[dict[str, Any]]:
        try:
            for seed in count():
                yield read_only(seed)
        finally:
            closed_by.append(threading.current_thread().name)

    staging = Staging(stream(), CPU)
    next(staging)
    staging.close()
    assert closed_by == ["dinoray-staging"]


def test_a_cpu_gets_the_batches_of_the_store_themselves() -> None:
    batches = [read_only(0)]
    assert staged(batches, CPU) is batches


def trained(batches: Iterable[Any], *, steps: int = 1000) -> tuple[TrainState, list[float]]:
    """The state after some steps, and how long each waited for its batch."""
    state, waits = build_state(CONFIG, num_images=NUM_IMAGES), []

    def on_step(_: Any, __: Any, wait_seconds: float) -> bool:
        waits.append(wait_seconds)
        return len(waits) == steps

    train(state, batches, on_step=on_step)
    return state, waits


def test_a_run_that_ends_early_leaves_no_thread_and_the_same_weights() -> None:
    ours, _ = trained(_staged((read_only(seed) for seed in count()), CPU), steps=3)
    assert threads() == []  # the generator ended with the loop, and closed what it had opened
    plain, _ = trained([read_only(seed) for seed in range(3)])
    for a, b in zip(ours.dino.parameters(), plain.dino.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_waits_as_long_as_its_batch_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third batch comes 7 seconds after it was asked for, by a clock that stands still otherwise."""
    now, reads, third_is_asked_for = [0.0], count(1), threading.Event()

    def read() -> float:
        if next(reads) == 5:  # two a step: before its batch and after it
            third_is_asked_for.set()
        return now[0]

    def stream() -> Iterator[Any]:
        yield from (read_only(0), read_only(1))
        assert third_is_asked_for.wait(60)
        now[0] += 7
        yield read_only(2)

    monkeypatch.setattr(step, "time", SimpleNamespace(perf_counter=read))
    assert trained(Staging(stream(), CPU))[1] == [0, 0, 7]


def test_what_is_still_to_be_done_to_the_crops_is_staged_with_them() -> None:
    config = tiny_config(crops={"photometric": "device"})
    batch = tiny_batch(config)
    (ours,) = Staging([batch], CPU)
    for name in DEVICE_COLUMNS:
        assert isinstance(ours[name], torch.Tensor)
        assert np.array_equal(ours[name].numpy(), batch[name])
