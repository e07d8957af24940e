"""Which steps are saved; what Ray Train does with them is in tests/end_to_end."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tiny import NUM_IMAGES
from tiny_states import after

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.config import CheckpointConfig
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.worker.agreement import Agreement
from dinoray.pipeline.worker.saving import Saver


def rank_1(folder: Path, state: TrainState, agreement: Agreement | None = None) -> Saver:
    """The saver of a rank without outputs, at step 5."""
    state.step = 5
    spec: Any = SimpleNamespace(
        run=Directory(str(folder)),
        num_images=NUM_IMAGES,
        check_fence=lambda: None,
        checkpoint=CheckpointConfig(),
    )
    agreement = agreement or Agreement(patience_seconds=0, known=lambda _: None)
    return Saver(state, Quarantine(), cast(Any, spec), None, agreement)


def test_a_rank_that_writes_nothing_leaves_out_a_save_that_rank_0_has_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agreement = Agreement(patience_seconds=0, known=lambda _: None)
    monkeypatch.setattr(agreement, "is_everywhere", lambda mine: False)
    saver = rank_1(tmp_path, after(1), agreement)
    monkeypatch.setattr(saver, "_report", lambda *_, **__: pytest.fail("a checkpoint is reported"))
    saver.save(is_last=False, waits_for_storage=False)


@pytest.mark.parametrize("part", ["student", "center", "optimizer"])
def test_a_state_that_is_not_finite_is_saved_as_the_last_alone(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Ray's list it would take the place of one that can be resumed from. Outside of Ray Train a report raises."""
    state = after(1)
    saver = rank_1(tmp_path, state)
    with pytest.raises(RuntimeError):
        saver.save(is_last=False, waits_for_storage=False)
    moments = next(iter(state.optimizer.state.values()))
    place = {
        "student": next(state.dino.student.parameters()),
        "center": state.dino.center,
        "optimizer": moments["exp_avg"],
    }[part]
    with torch.no_grad():
        place.view(-1)[0] = float("inf")
    saver.save(is_last=False, waits_for_storage=False)
    with pytest.raises(RuntimeError):
        saver.save(is_last=True, waits_for_storage=False)
    replaced: list[bool] = []
    monkeypatch.setattr(saver, "_report", lambda _, *, replaces: replaced.append(replaces))
    saver.save(is_last=True, waits_for_storage=False)
    assert replaced == [False], "those before it, which are finite, must stay"
