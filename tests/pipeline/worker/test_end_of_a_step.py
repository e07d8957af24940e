"""What is due after a step, in the order in which it is done."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from dinoray.pipeline.worker.cadence import Due
from dinoray.pipeline.worker.worker import _Worker

STEP = 7


def what_is_done(due: Due, *, asked_to_end: bool, skipped: int = 0) -> list[str]:
    """What a worker does after a step, in order; a save is one of the step, as that of `Saver` is."""
    done: list[str] = []
    worker = _Worker.__new__(_Worker)
    saver = SimpleNamespace(saved_step=0, check=Mock())

    def save(*, is_last: bool, waits_for_storage: bool) -> None:
        saver.saved_step = STEP
        done.append("saves the last" if is_last else "saves and waits" if waits_for_storage else "saves")

    saver.save = save
    stubs: dict[str, Any] = {
        "state": SimpleNamespace(step=STEP, skipped_in_a_row=skipped, skips=Mock(take=list)),
        "rank": 1,
        "outputs": None,
        "stopped": False,
        "capture": Mock(),
        "quarantine": Mock(),
        "signs": Mock(),
        "evaluations": Mock(),
        "guard": Mock(),
        "saver": saver,
        "cadence": SimpleNamespace(due=lambda step, fails: due),
        "agreement": SimpleNamespace(ends=asked_to_end),
        "spec": SimpleNamespace(
            stream=SimpleNamespace(num_streams=1),
            health=SimpleNamespace(max_skipped=10),
            waits_for_decision=False,
            checkpoint=SimpleNamespace(every_minutes=None),
        ),
        "_log_step": lambda *_: done.append("logs"),
        "_evaluate": lambda: done.append("evaluates"),
    }
    for name, value in stubs.items():
        setattr(worker, name, value)
    assert worker._on_step({}, {}, 0.0) == (asked_to_end and not due.ends)
    return done


def due(*, evaluates: bool = False, saves: bool = False, ends: bool = False) -> Due:
    """What is due after a step that is logged."""
    return Due(logs=True, evaluates=evaluates, saves=saves, ends=ends)


@pytest.mark.parametrize("saves", [False, True])
def test_who_is_asked_to_end_saves_before_an_evaluation_and_only_once(saves: bool) -> None:
    assert what_is_done(due(evaluates=True, saves=saves), asked_to_end=True) == [
        "logs",
        "saves and waits",
        "evaluates",
    ]


def test_others_evaluate_before_they_save() -> None:
    assert what_is_done(due(evaluates=True, saves=True), asked_to_end=False) == ["logs", "evaluates", "saves"]


def test_the_last_step_is_saved_after_its_evaluation_though_asked_to_end() -> None:
    assert what_is_done(due(evaluates=True, saves=True, ends=True), asked_to_end=True) == [
        "logs",
        "evaluates",
        "saves the last",
    ]


def test_while_steps_are_skipped_none_but_the_last_is_saved() -> None:
    assert what_is_done(due(saves=True), asked_to_end=True, skipped=1) == ["logs"]
    assert what_is_done(due(saves=True, ends=True), asked_to_end=False, skipped=1) == [
        "logs",
        "saves the last",
    ]
