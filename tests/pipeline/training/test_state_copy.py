"""The copy that a checkpoint is written from is the state at its step, whatever the next steps do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NUM_IMAGES, TINY_RESNET, tiny_batch
from tiny_states import after, save

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.training import state_copy
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.checkpoint import read_parts
from dinoray.pipeline.training.state_copy import StateCopy, is_finite
from dinoray.pipeline.training.step import train_step

FILES = ("student.safetensors", "teacher.safetensors", "train_state.pt", "meta.json")
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "adamw": {},
    "lars and batch norm": {
        "optim": {"name": "lars"},
        "backbone": TINY_RESNET,
        "head": {"use_bn": True},
    },
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=list(CHANGES))
def test_what_is_written_is_the_state_at_its_step(tmp_path: Path, changes: dict[str, dict[str, Any]]) -> None:
    state, copy, quarantine = after(2, **changes), StateCopy(), Quarantine()
    at_once = save(state, tmp_path / "at once")
    copy.take(state, num_images=NUM_IMAGES, quarantine=quarantine)
    quarantine.counts["corrupt"] += 1
    quarantine._count_kind({"status": "corrupt", "reason": "cut off", "key": "a"})
    for seed in (2, 3):
        train_step(state, tiny_batch(state.config, seed=seed))
    copy.write(Directory(str(tmp_path / "later")))
    assert copy.step == 2
    for file in FILES:
        assert (tmp_path / "later" / file).read_bytes() == (at_once / file).read_bytes(), file


def test_a_second_copy_takes_the_memory_of_the_first(tmp_path: Path) -> None:
    state, copy = after(2), StateCopy()
    copy.take(state, num_images=NUM_IMAGES, quarantine=Quarantine())
    places = {name: buffer.data_ptr() for name, buffer in copy._buffers.items()}
    train_step(state, tiny_batch(state.config, seed=2))
    copy.take(state, num_images=NUM_IMAGES, quarantine=Quarantine())
    assert {name: buffer.data_ptr() for name, buffer in copy._buffers.items()} == places
    copy.write(Directory(str(tmp_path / "copied")))
    for file in FILES:
        expected = (save(state, tmp_path / "at once") / file).read_bytes()
        assert (tmp_path / "copied" / file).read_bytes() == expected, file


def test_files_are_made_of_what_is_there_once_the_device_has_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that copies only while the writing thread waits for it; training queues its next step before."""
    order: list[str] = []

    class Mark:
        def synchronize(self) -> None:
            order.append("copied")
            for buffer, value in late:
                buffer.copy_(value)

    late: list[tuple[torch.Tensor, torch.Tensor]] = []
    at_once = save(after(1), tmp_path / "at once")
    monkeypatch.setattr(state_copy, "mark", lambda device: order.append(f"marked on {device}") or Mark())
    state, copy = after(1), StateCopy()
    copy.take(state, num_images=NUM_IMAGES, quarantine=Quarantine())
    late = [(buffer, buffer.clone()) for buffer in copy._buffers.values()]
    for buffer, _ in late:
        buffer.zero_()
    order.append("next step")
    copy.write(Directory(str(tmp_path / "late")))
    assert order == ["marked on cpu", "next step", "copied"]
    for file in FILES:
        assert (tmp_path / "late" / file).read_bytes() == (at_once / file).read_bytes(), file


def test_a_copy_shares_no_memory_with_the_state() -> None:
    state, copy = after(1), StateCopy()
    copy.take(state, num_images=NUM_IMAGES, quarantine=Quarantine())
    moments = [x for of in state.optimizer.state.values() for x in of.values() if torch.is_tensor(x)]
    live = {x.data_ptr() for x in (*state.dino.state_dict().values(), *moments)}
    assert not live & {buffer.data_ptr() for buffer in copy._buffers.values()}
    assert copy.num_bytes >= sum(x.nbytes for x in (*state.dino.state_dict().values(), *moments))


def test_a_copy_is_read_back_as_it_was(tmp_path: Path) -> None:
    state = after(2)
    parts = read_parts(save(state, tmp_path / "step_00000002"))
    for mine, theirs in zip(
        state.optimizer.state.values(), parts.train_state["optimizer"]["state"].values(), strict=True
    ):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(parts.train_state["center"], state.dino.center)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_that_are_too_large_are_not_taken_for_infinity(dtype: torch.dtype) -> None:
    largest = torch.full((3,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite([largest, torch.empty(0)])
    for value in (float("inf"), float("-inf"), float("nan")):
        bad = largest.clone()
        bad[1] = value
        assert not is_finite([bad])
    assert not is_finite([torch.tensor([float("inf"), float("-inf")], dtype=dtype)])
