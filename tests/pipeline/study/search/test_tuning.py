"""ASHA decides, the referee tells, the past counts: without Tune's loop, on trials that are names and numbers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dinoray.pipeline.study.search.tuner import TrialListener, _cause
from dinoray.pipeline.study.search.tuning import AshaConfig, Search, _Refereed
from dinoray.pipeline.study.trials import Trial


class Told:
    """Stands for the referee's actor: keeps what it is told."""

    def __init__(self) -> None:
        self.decisions: dict[tuple[int, int], bool] = {}
        self.decide = SimpleNamespace(remote=self._decide)

    def _decide(self, number: int, step: int, should_continue: bool) -> None:
        self.decisions[number, step] = should_continue


def tune_trial(number: int) -> Any:
    config = {"trial": vars(Trial(number, {}, 0, "tpe"))}
    return SimpleNamespace(trial_id=f"id-{number}", config=config)


def refereed(halving: AshaConfig | None, **past: Any) -> tuple[_Refereed, Told]:
    told = Told()
    search = Search(propose=lambda: None, on_end=lambda *_: None, tell=print, **past)
    return _Refereed(told, halving, search), told


def play(scheduler: _Refereed, number: int, scores: dict[int, float]) -> None:
    trial = tune_trial(number)
    scheduler.on_trial_add(None, trial)
    for step, score in scores.items():
        action = scheduler.on_trial_result(None, trial, {"step": step, "score": score})
        assert action == "CONTINUE"  # whatever was decided: the trial ends by itself


HALVING = AshaConfig(grace_steps=10, factor=2, total_steps=40)


def test_the_worse_half_is_told_to_stop_after_the_grace_and_not_before() -> None:
    scheduler, told = refereed(HALVING)
    play(scheduler, 0, {5: 0.5, 10: 0.5})
    play(scheduler, 1, {5: 0.1, 10: 0.1})
    play(scheduler, 2, {5: 0.9, 10: 0.9})
    assert told.decisions == {
        (0, 5): True,
        (0, 10): True,
        (1, 5): True,
        (1, 10): False,
        (2, 5): True,
        (2, 10): True,
    }


def test_without_halving_everyone_goes_on() -> None:
    for halving in (None, AshaConfig(grace_steps=40, factor=2, total_steps=40)):
        scheduler, told = refereed(halving)
        play(scheduler, 0, {20: 0.9})
        play(scheduler, 1, {20: 0.1})
        assert all(told.decisions.values())


def test_trials_of_an_earlier_life_count_as_if_it_had_not_ended() -> None:
    scheduler, told = refereed(HALVING, ended={0: {5: 0.5, 10: 0.5}, 1: {10: 0.7}})
    play(scheduler, 2, {10: 0.6})
    play(scheduler, 3, {10: 0.4})
    assert told.decisions == {(2, 10): True, (3, 10): False}


def test_a_trial_that_goes_on_is_not_judged_again_by_what_was_decided_then() -> None:
    scheduler, told = refereed(HALVING, ended={0: {10: 0.9, 20: 0.9}}, begun={1: {10: 0.2}})
    play(scheduler, 1, {15: 0.3, 20: 0.1})
    assert told.decisions == {(1, 15): True, (1, 20): False}


def test_what_is_no_evaluation_is_not_decided_on() -> None:
    scheduler, told = refereed(HALVING)
    trial = tune_trial(0)
    scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, trial, {"error": "no such bucket", "exit_code": 3}) == "CONTINUE"
    assert told.decisions == {}


def test_a_trial_that_failed_says_what_of_in_one_line(tmp_path: Path) -> None:
    written = tmp_path / "error.txt"
    written.write_text("Failure # 1 (occurred at noon)\nTraceback ...\nValueError: depth must be above 0\n\n")
    trial: Any = SimpleNamespace(error_file=str(written))
    assert _cause(trial) == "ValueError: depth must be above 0"
    assert _cause(SimpleNamespace(error_file=None)) == "its process was lost"  # type: ignore[arg-type]


def test_a_trial_that_is_started_again_is_told_of_with_the_cause(tmp_path: Path) -> None:
    class Attempt:
        error_file = str(tmp_path / "error.txt")

        def __str__(self) -> str:
            return "0003"

    told: list[str] = []
    cleared: list[str] = []
    attempt: Any = Attempt()
    listener = TrialListener(SimpleNamespace(clear=cleared.append), told.append)  # type: ignore[arg-type]
    listener.on_trial_start(0, [attempt], attempt)
    assert told == []
    listener.on_trial_recover(0, [attempt], attempt)
    listener.on_trial_start(0, [attempt], attempt)
    assert told == ["trial 0003  failed (its process was lost), is started again"]
    assert cleared == ["0003", "0003"]
