"""benchmarks/forecast.py: the arithmetic between what the clock says and what other programs left of the machine."""

import os

import forecast
import pytest

from dinoray.jobs.cli.config import load
from dinoray.jobs.cluster.measure import Measured
from dinoray.jobs.cluster.plan_config import PlanConfig
from dinoray.pipeline.planning.node_rates import Figures


def test_others_took_what_was_used_and_not_by_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    # In 10 s two CPUs have 20 s: 12 were used, 7 by the run, so that 5 of 20 were others'.
    samples = [(100.0, 3.0, 50.0), (104.0, 4.0, 55.0), (110.0, 10.0, 62.0)]
    assert forecast.share_of_others(samples) == pytest.approx(0.25)
    # Clocks of different grain may say that the run used more than all did.
    assert forecast.share_of_others([(0.0, 0.0, 0.0), (1.0, 1.01, 1.0)]) == 0.0


def test_the_forecast_is_made_from_the_mean_of_both_measurements() -> None:
    config = load(PlanConfig, "demo", None, [])
    before, after = (
        Measured(Figures(crops, step, 4000.0, 1.0, 0.1), 2160, False, {})
        for crops, step in ((900.0, 90.0), (1100.0, 110.0))
    )
    mean = Measured(Figures(1000.0, 100.0, 4000.0, 1.0, 0.1), 2160, False, {})
    assert forecast.plan(config, before, after) == forecast.plan(config, mean, mean)
