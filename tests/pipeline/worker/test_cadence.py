"""What is due at a step."""

from hypothesis import given
from hypothesis import strategies as st

from dinoray.pipeline.worker.cadence import Cadence, Due

every = st.integers(1, 7)


@given(total=st.integers(1, 30), log=every, evaluate=every, save=every)
def test_due_steps_are_the_multiples_and_the_end(total: int, log: int, evaluate: int, save: int) -> None:
    cadence = Cadence(total, log_every=log, eval_every=evaluate, checkpoint_every=save)
    due = {step: cadence.due(step) for step in range(1, total + 1)}
    evaluated = {*range(evaluate, total + 1, evaluate), total}
    saved = {*range(save, total + 1, save), total}
    assert {step for step in due if due[step].evaluates} == evaluated
    assert {step for step in due if due[step].saves} == saved
    assert {step for step in due if due[step].logs} == {*range(log, total + 1, log)} | evaluated | saved
    assert [step for step in due if due[step].ends] == [total]


def test_a_failing_step_is_logged_and_nothing_else() -> None:
    cadence = Cadence(100, log_every=10, eval_every=20, checkpoint_every=50)
    assert cadence.due(7) == Due(ends=False, logs=False, evaluates=False, saves=False)
    assert cadence.due(7, fails=True) == Due(ends=False, logs=True, evaluates=False, saves=False)
