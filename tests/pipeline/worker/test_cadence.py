"""What is due at a step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.tracking.config import LogConfig
from dinoray.pipeline.training.config import CheckpointConfig
from dinoray.pipeline.worker.cadence import Cadence, Due

every = st.integers(1, 7)


@given(total=st.integers(1, 30), log=every, evaluate=every, save=st.lists(every, max_size=3))
def test_due_steps_are_the_multiples_and_the_end(
    total: int, log: int, evaluate: int, save: list[int]
) -> None:
    cadence = Cadence(total, log_every=log, eval_every=evaluate, save_every=tuple(save))
    due = {step: cadence.due(step) for step in range(1, total + 1)}
    evaluated = {*range(evaluate, total + 1, evaluate), total}
    saved = {step for step in due if step == total or any(step % steps == 0 for steps in save)}
    assert {step for step in due if due[step].evaluates} == evaluated
    assert {step for step in due if due[step].saves} == saved
    assert cadence.num_saves == len(saved)
    assert {step for step in due if due[step].logs} == {*range(log, total + 1, log)} | evaluated | saved
    assert [step for step in due if due[step].ends] == [total]


@pytest.mark.parametrize(
    ("settings", "is_scored", "expected"),
    [
        ({"num_best_to_keep": 0}, True, (5,)),
        ({"num_best_to_keep": 0, "keep_every_steps": 7}, True, (5, 7)),
        ({"num_best_to_keep": 2}, True, (5, 20)),
        ({"num_best_to_keep": 2}, False, (5,)),
        ({"num_best_to_keep": 0, "every_minutes": 3.5}, True, ()),
        ({"every_minutes": "auto", "keep_every_steps": 7}, True, (7, 20)),
    ],
)
def test_what_is_kept_for_its_step_or_score_is_saved_whatever_the_interval(
    settings: dict[str, object], is_scored: bool, expected: tuple[int, ...]
) -> None:
    checkpoint = CheckpointConfig.model_validate({"every_steps": 5, **settings})
    options = {"log": LogConfig(), "evaluation": EvalConfig(every_steps=20), "checkpoint": checkpoint}
    cadence = Cadence.of(100, **options, is_scored=is_scored)  # type: ignore[arg-type]
    assert cadence == Cadence(100, 10, 20, expected)


@pytest.mark.parametrize(("is_scored", "expected"), [(True, (5, 20)), (False, (5,))])
def test_what_is_evaluated_beside_training_is_saved_to_be_evaluated_again_after_a_loss(
    is_scored: bool, expected: tuple[int, ...]
) -> None:
    checkpoint = CheckpointConfig(every_steps=5, num_best_to_keep=0)
    evaluation = EvalConfig(every_steps=20, where="side")
    cadence = Cadence.of(
        100, log=LogConfig(), evaluation=evaluation, checkpoint=checkpoint, is_scored=is_scored
    )
    assert cadence.save_every == expected


def test_a_failing_step_is_logged_and_nothing_else() -> None:
    cadence = Cadence(100, log_every=10, eval_every=20, save_every=(50,))
    assert cadence.due(7) == Due(ends=False, logs=False, evaluates=False, saves=False)
    assert cadence.due(7, fails=True) == Due(ends=False, logs=True, evaluates=False, saves=False)
