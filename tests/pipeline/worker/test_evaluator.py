"""What rank 0 makes of an evaluator's answers; the real one is in tests/end_to_end/test_side_evaluation.py."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

from dinoray.models.errors import DataError
from dinoray.pipeline.cluster.resources import ResourcesConfig
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.in_training import Evaluation
from dinoray.pipeline.worker import evaluator
from dinoray.pipeline.worker.evaluator import SideEvaluations

STARTED = "the actor has started"
DIED, MEMORY = ActorDiedError(), OutOfMemoryError("killed")
FAILED = RayTaskError("evaluate", "Traceback", ValueError("no such kernel"))


class FakeRay:
    """In place of Ray: each evaluation is answered by the next of `answers`; None: it is still at work."""

    def __init__(self, *answers: Any, starts: bool = True) -> None:
        self.answers, self.starts, self.num_actors = list(answers), starts, 0
        self.asked: list[int] = []

    def actor(self) -> Any:
        self.num_actors += 1
        return SimpleNamespace(
            evaluate=SimpleNamespace(remote=lambda step, _: self.asked.append(step) or step)
        )

    def wait(self, refs: list[Any], *, timeout: float) -> tuple[list[Any], list[Any]]:
        ready = self.starts if refs == [STARTED] else bool(self.answers and self.answers[0] is not None)
        return (refs, []) if ready else ([], refs)

    def get(self, step: int) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception) and not isinstance(answer, DataError):
            raise answer
        return answer

    def kill(self, actor: Any) -> None: ...


class Side:
    """Rank 0's side of it, and what it has logged and said."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, fake: FakeRay, *, timeout_minutes: Any = "auto", **limits: Any
    ) -> None:
        self.logged: list[tuple[int, str]] = []
        self.missing: dict[int, str] = {}
        self.notes: list[str] = []
        monkeypatch.setattr(evaluator, "ray", fake)
        spec = SimpleNamespace(
            eval=EvalConfig(timeout_minutes=timeout_minutes),
            resources=ResourcesConfig(**limits),
            give_up_after_seconds=900,
        )
        self.evaluations = SideEvaluations(
            cast(Any, spec),
            num_ranks=1,
            trains_on_cpus=True,
            log=lambda step, found: self.logged.append((step, cast(str, found))),
            miss=self.missing.__setitem__,
            note=self.notes.append,
        )

        def begin_actor() -> None:
            self.evaluations._actor, self.evaluations._start = fake.actor(), cast(Any, STARTED)
            self.evaluations._started_at = evaluator.time.monotonic()

        monkeypatch.setattr(self.evaluations, "_begin_actor", begin_actor)


def found(name: str) -> Evaluation:
    return cast(Evaluation, name)


def test_a_lost_evaluator_is_replaced_and_results_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(None)
    side = Side(monkeypatch, fake)
    for step in (10, 20):
        side.evaluations.add(step, cast(Any, "weights"))
    assert not side.evaluations.has_room(0)
    assert not side.evaluations.has_room(0)
    assert [note[:51] for note in side.notes] == ["training waits for the evaluation of step 10, of wh"]
    fake.answers = [DIED, FAILED, found("of 10"), None]
    assert side.evaluations.has_room(0)
    assert (side.logged, side.evaluations.steps) == ([(10, "of 10")], [20])
    fake.answers = [MEMORY, found("of 20")]
    side.evaluations.look()
    assert side.logged == [(10, "of 10"), (20, "of 20")]
    assert (fake.asked, fake.num_actors) == ([10, 10, 10, 20, 20], 4)
    assert [note.rpartition(": ")[2] for note in side.notes[1:]] == [
        "its process or its node was lost",
        "no such kernel",
        "memory ran out on its node",
    ]
    assert side.missing == {}


def test_one_that_fails_three_times_is_missing_and_the_next_has_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    side = Side(monkeypatch, FakeRay(DIED, DIED, MEMORY, found("of 20")))
    side.evaluations.add(10, cast(Any, "weights"))
    side.evaluations.add(20, cast(Any, "weights"))
    assert side.missing == {10: "it failed 3 times: memory ran out on its node"}
    assert side.logged == [(20, "of 20")]


def test_an_error_that_a_person_can_act_on_ends_the_run_as_in_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    side = Side(monkeypatch, FakeRay(DataError("cat.jpg has no label; give it one")))
    with pytest.raises(DataError, match=r"cat\.jpg has no label"):
        side.evaluations.add(10, cast(Any, "weights"))


def test_one_without_room_is_told_once_and_given_up_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    side = Side(monkeypatch, FakeRay(None, starts=False), evaluator_gpus=1, wait_for_nodes_minutes=10)
    now = [100.0]
    monkeypatch.setattr(evaluator, "time", SimpleNamespace(monotonic=lambda: now[0]))
    side.evaluations.add(10, cast(Any, "weights"))
    assert side.notes == []
    for now[0] in (170.0, 180.0, 690.0):
        side.evaluations.look()
    needs = "which needs 0 CPUs and 1 GPUs of one node"
    assert side.notes == [f"warning: the evaluator has not started for 70 s, {needs}"]
    now[0] = 701.0
    side.evaluations.look()
    assert side.missing == {10: f"the evaluator has not started for 601 s, {needs}"}
    assert side.evaluations.steps == []


def test_an_evaluator_that_hangs_is_replaced_and_the_evaluation_missing_at_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeRay(None)
    side = Side(monkeypatch, fake, timeout_minutes=2)
    now = [1000.0]
    monkeypatch.setattr(evaluator, "time", SimpleNamespace(monotonic=lambda: now[0]))
    killed: list[Any] = []
    monkeypatch.setattr(fake, "kill", killed.append)
    why = "it took longer than 2 minutes; if it needs more, set eval.timeout_minutes=4"
    fake.starts = False
    side.evaluations.add(10, cast(Any, "weights"))
    now[0] += 125
    side.evaluations.look()  # waiting for room is not work
    fake.starts = True
    side.evaluations.look()
    for _ in range(2):
        now[0] += 119
        side.evaluations.look()
        assert fake.num_actors == len(killed) + 1
        now[0] += 2
        side.evaluations.look()  # it is ended
        side.evaluations.look()  # and another one begun
    assert side.notes[1:] == [f"the evaluation of step 10 is begun again: {why}"] * 2
    assert (len(killed), fake.num_actors, fake.asked) == (2, 3, [10, 10, 10])
    side.evaluations.add(20, cast(Any, "weights"))
    now[0] += 121
    side.evaluations.look()
    assert side.missing == {10: f"it failed 3 times: {why}"}
    fake.answers = [found("of 20")]
    side.evaluations.look()
    assert side.logged == [(20, "of 20")]
