"""Who proposes the next point of a study: at random, by a grid, evenly, or by TPE from what was found so far.

A proposal is a function of the seed, the trial's number and the trials that are known by then, never of a generator's
state: a study that was killed goes on as if it had not been. Points are those of the unit cube
(pipeline/study/space.py). Optuna is known here alone. No Ray here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.study.config import Searcher
from pipeline.study.space import Space, at, grid, place


class Known(NamedTuple):
    """A trial as a sampler sees it: where it lies, its number, and its score, None while it runs."""

    number: int
    params: Mapping[str, Any]
    score: float | None
    course: Mapping[int, float]
    """Scores by step, of a trial that was given up before its end; else empty."""


Propose = Callable[[int, Sequence[Known]], tuple[dict[str, Any], str]]
"""(number of the trial, all that are known) -> its parameters, and who proposed them."""


def sampler(
    kind: Searcher,
    space: Space,
    *,
    seed: int,
    first: Sequence[Mapping[str, Any]],
    num_trials: int,
    grid_points: int,
) -> Propose:
    """Proposes `first`, in order, then by `kind`; TPE begins with even points: a third of `num_trials`, at most ten."""
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
    """Trials of a whole grid."""
    return len(grid(space, grid_points))


def _even_point(space: Space, seed: int, nth: int) -> dict[str, float]:
    """The nth point of a scrambled Sobol sequence: any first n of them cover the cube evenly."""
    import torch  # two seconds that few studies need

    engine = torch.quasirandom.SobolEngine(max(1, len(space)), scramble=True, seed=seed)
    point = (
        engine.fast_forward(nth).draw(1, dtype=torch.float64)[0]
        if nth
        else engine.draw(1, dtype=torch.float64)[0]
    )
    return dict(zip(space, point.tolist(), strict=False))


def _tpe(space: Space, seed: int, number: int, known: Sequence[Known]) -> dict[str, float]:
    """Optuna's multivariate TPE on the cube; trials that run count as bad, so that neighbours are not tried at once."""
    import optuna  # half a second that only studies need
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
            continue  # a first point outside of the space
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
    """A point of the cube with the numbers of choices in place of where they lie: they have no order."""
    return {
        key: int(cube[key] * len(d.values)) if d.kind == "choice" else cube[key] for key, d in space.items()
    }
