"""Search algorithms of a study: random, grid, Sobol, and TPE from earlier scores.

A proposal is a function of the seed, the trial's number and the trials known so far, never of a generator's
state. So a killed study resumes with the same proposals. Points lie in the unit cube
(pipeline/study/space.py). Only this module uses Optuna. No Ray here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dinoray.pipeline.study.config import Searcher
from dinoray.pipeline.study.space import Space, at, grid, place


class Known(NamedTuple):
    """A trial as an observation: its parameters, its number, and its score, None while it runs."""

    number: int
    params: Mapping[str, Any]
    score: float | None
    course: Mapping[int, float]
    """Scores by step of an early-stopped trial; else empty."""


Propose = Callable[[int, Sequence[Known]], tuple[dict[str, Any], str]]
"""(number of the trial, all known trials) -> (parameters, source of the proposal)."""


def sampler(
    kind: Searcher,
    space: Space,
    *,
    seed: int,
    first: Sequence[Mapping[str, Any]],
    num_trials: int,
    grid_points: int,
) -> Propose:
    """Return a function that proposes `first` in order, then by `kind`.

    TPE begins with Sobol points: a third of `num_trials`, at most ten.
    """
    table = grid(space, grid_points) if kind == "grid" else []
    num_even = min(10, max(4, num_trials // 3))

    def propose(number: int, known: Sequence[Known]) -> tuple[dict[str, Any], str]:
        if number < len(first):
            return dict(first[number]), "first"
        nth = number - len(first)
        if kind == "grid":
            return table[nth % len(table)], "grid"
        if kind == "random":
            rng = np.random.default_rng((seed, nth))
            return at(space, {key: float(rng.random()) for key in space}), "random"
        if kind == "quasi" or nth < num_even:
            return at(space, _even_point(space, seed, nth)), "quasi"
        return at(space, _tpe(space, seed, number, known)), "tpe"

    return propose


def grid_size(space: Space, grid_points: int) -> int:
    """Return the number of trials of a whole grid."""
    return len(grid(space, grid_points))


def _even_point(space: Space, seed: int, nth: int) -> dict[str, float]:
    """Return the nth point of a scrambled Sobol sequence: any first n points cover the cube evenly."""
    import torch  # takes two seconds; few studies need it

    engine = torch.quasirandom.SobolEngine(max(1, len(space)), scramble=True, seed=seed)
    point = (
        engine.fast_forward(nth).draw(1, dtype=torch.float64)[0]
        if nth
        else engine.draw(1, dtype=torch.float64)[0]
    )
    return dict(zip(space, point.tolist(), strict=False))


def _tpe(space: Space, seed: int, number: int, known: Sequence[Known]) -> dict[str, float]:
    """Return a point by Optuna's multivariate TPE; running trials count as bad: neighbours are avoided."""
    import optuna  # takes half a second; only studies need it
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions: dict[str, Any] = {
        key: CategoricalDistribution(range(len(d.values)))
        if d.kind == "choice"
        else FloatDistribution(0.0, 1.0)
        for key, d in space.items()
    }
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(
            multivariate=True, constant_liar=True, n_startup_trials=0, seed=seed * 1_000_003 + number
        ),
    )
    for trial in sorted(known):
        if not all(key in trial.params and domain.holds(trial.params[key]) for key, domain in space.items()):
            continue  # a first point outside the space
        running = trial.score is None
        state = TrialState.RUNNING if running else TrialState.PRUNED if trial.course else TrialState.COMPLETE
        study.add_trial(
            create_trial(
                state=state,
                value=None if running or trial.course else trial.score,
                params=_indices(space, place(space, trial.params)),
                distributions=distributions,
                intermediate_values=dict(trial.course),
            )
        )
    found = study.ask(distributions).params
    return {
        key: (found[key] + 0.5) / len(d.values) if d.kind == "choice" else found[key]
        for key, d in space.items()
    }


def _indices(space: Space, cube: Mapping[str, float]) -> dict[str, Any]:
    """Return a point of the cube with indices for choices instead of positions: choices have no order."""
    return {
        key: int(cube[key] * len(d.values)) if d.kind == "choice" else cube[key] for key, d in space.items()
    }
