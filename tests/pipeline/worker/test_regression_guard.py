"""A run that is worse than its start is named once, or ends on all ranks with the same words."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from dinoray.pipeline.tracking.start import Regression
from dinoray.pipeline.training.config import HealthConfig
from dinoray.pipeline.training.verdict import UnhealthyError, Verdict
from dinoray.pipeline.worker import regression_guard
from dinoray.pipeline.worker.cadence import Due
from dinoray.pipeline.worker.regression_guard import RegressionGuard

LOGGED = Due(ends=False, logs=True, evaluates=True, saves=False)
FOUND = Regression(40, "k-NN 10.0% (k=20) at step 60 is 70.0 points below the start, 80.0%")


def outputs_of(*, found: Regression | None = FOUND) -> Any:
    lines: list[str] = []
    return SimpleNamespace(regression=found, lines=lines, note=lines.append)


def test_it_warns_once_until_the_run_has_recovered() -> None:
    outputs = outputs_of()
    guard = RegressionGuard(HealthConfig(), outputs)
    guard.look(LOGGED._replace(logs=False))
    assert outputs.lines == []
    for _ in range(3):
        guard.look(LOGGED)
    assert outputs.lines == [
        f"warning: worse than the start since step 40: {FOUND.what}; {Verdict.WORSE.remedy}"
    ]
    outputs.regression = None
    guard.look(LOGGED)
    outputs.regression = FOUND
    guard.look(LOGGED)
    assert len(outputs.lines) == 2


def test_it_stops_all_ranks_with_the_words_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    config = HealthConfig(on_regression="stop")
    with pytest.raises(UnhealthyError, match=r"to continue anyway, set health\.on_regression=warn") as mine:
        RegressionGuard(config, outputs_of()).look(LOGGED)
    assert mine.value.verdict is Verdict.WORSE
    assert mine.value.raised_by_all_ranks
    words = str(mine.value).removesuffix("; to continue anyway, set health.on_regression=warn")
    monkeypatch.setattr(regression_guard.distributed, "gather", lambda text: [words, text])
    with pytest.raises(UnhealthyError) as theirs:
        RegressionGuard(config, None).look(LOGGED)
    assert str(theirs.value) == str(mine.value)


def test_after_the_last_step_it_warns_only() -> None:
    outputs = outputs_of()
    RegressionGuard(HealthConfig(on_regression="stop"), outputs).look(LOGGED._replace(ends=True))
    assert len(outputs.lines) == 1


def test_a_healthy_run_is_left_alone() -> None:
    outputs = outputs_of(found=None)
    RegressionGuard(HealthConfig(on_regression="stop"), cast(Any, outputs)).look(LOGGED)
    RegressionGuard(HealthConfig(), None).look(LOGGED)
    assert outputs.lines == []
