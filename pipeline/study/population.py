"""A population that trains at once while PB2 moves its settings: weak members go on from strong ones' weights.

A member is a sequence of trials: each time it takes over another's
weights it becomes a new one, which begins at that one's checkpoint with parameters that PB2 chose. Tune ends the
process of a member that takes over: its workers are removed here, and what Ray Train had set to watch over them ends
by itself where there is a dashboard.
"""

import importlib.util
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.util.state
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler
from ray.tune.schedulers.pb2 import PB2
from ray.util.placement_group import PlacementGroup

from models.settings import DinorayError, ResourceError, one_line
from pipeline.storage import Directory
from pipeline.study.tuner import Listener, Placements, Unsaved, run_tune, tell_error

_POINTER = "pointer.json"


class Pointer(NamedTuple):
    """A checkpoint: of which trial, after which step."""

    number: int
    step: int


class MemberReport:
    """What a member tells at each evaluation: its score, and the checkpoint that others may go on from."""

    def __init__(self, placements: Placements, slot: int) -> None:
        self._placements, self._slot = placements, slot

    def placed(self, group: PlacementGroup) -> None:
        """Tell where the workers are: Tune ends the process of a member that takes over, and not what it started."""
        self._placements.keep(_name(self._slot), group)

    def __call__(self, pointer: Pointer, score: float, scores: Mapping[str, float]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, _POINTER).write_text(json.dumps(pointer))
            tune.report(
                {**scores, "step": pointer.step, "score": score},
                checkpoint=tune.Checkpoint.from_directory(folder),
            )


Member = Callable[[int, Mapping[str, float], Pointer | None, MemberReport], None]
"""(its place in the population, point of the unit cube, where it goes on from, report) -> trained to its end."""


def run_population(
    starts: Sequence[Mapping[str, float]],
    member: Member,
    *,
    study: Directory,
    every_steps: int,
    max_failures: int,
    seed: int,
    on_end: Callable[[int, str | None], None],
    tell: Callable[[str], None],
) -> None:
    """Train a member from each point of `starts`; every `every_steps` the worst quarter takes over from the best.

    ResourceError where scikit-learn or the dashboard, which PB2 needs, is missing.
    """
    np.random.seed(seed)  # the only way in which PB2 takes one
    keys, placements = list(starts[0]), Placements()
    run_tune(
        _Trainable(member, keys, placements),
        _MemberListener(on_end, placements, tell),
        tune.TuneConfig(
            scheduler=_Population(keys, every_steps),
            trial_name_creator=_name_of,
            trial_dirname_creator=_name_of,
        ),
        study=study,
        max_failures=max_failures,
        space={"member": tune.grid_search([{"slot": slot, **start} for slot, start in enumerate(starts)])},
    )


def check_population(num_members: int, trials_at_once: int) -> None:
    """ResourceError unless the whole population fits at once, and PB2 has what it needs. On a Ray that is up."""
    if trials_at_once < num_members:
        raise ResourceError(
            f"tune.scheduler=pb2 trains all tune.trials={num_members} at once, and {trials_at_once} fit; "
            f"set tune.trials={trials_at_once}, or take tune.scheduler=asha"
        )
    if importlib.util.find_spec("sklearn") is None:
        raise ResourceError(
            "tune.scheduler=pb2 needs scikit-learn: pip install 'dinoray[pb2]', or take tune.scheduler=asha"
        )
    try:
        # By address: there may be more than one Ray on this machine.
        ray.util.state.list_nodes(address=ray.get_runtime_context().gcs_address, limit=1, timeout=20)
    except Exception as error:  # of many kinds, by what of the dashboard is missing
        raise ResourceError(
            f"tune.scheduler=pb2 needs Ray's dashboard, to end what watches over a replaced trial ({one_line(error)}); "
            "start the head with it, or take tune.scheduler=asha"
        ) from error


def _name(slot: int) -> str:
    return f"member-{slot}"


def _name_of(trial: TuneTrial) -> str:
    return _name(trial.config["member"]["slot"])


class _Trainable:
    """The function that Tune runs for a member, anew each time it takes over."""

    __name__ = "member"

    def __init__(self, member: Member, keys: Sequence[str], placements: Placements) -> None:
        self._member, self._keys, self._placements = member, keys, placements

    def __call__(self, config: dict[str, Any]) -> None:
        # By its name: a member that takes over gets the other's config, but for what PB2 chose.
        slot = slot_of(tune.get_context().get_trial_name())
        cube = {key: config[key] for key in self._keys}
        pointer = None
        if (checkpoint := tune.get_checkpoint()) is not None:
            with checkpoint.as_directory() as folder:
                pointer = Pointer(*json.loads(Path(folder, _POINTER).read_text()))
        try:
            self._member(slot, cube, pointer, MemberReport(self._placements, slot))
        except DinorayError as error:
            tell_error(error)


class _Population(Unsaved, PB2):
    """PB2 on the unit cube. No member waits for another: all of them fit at once."""

    def __init__(self, keys: Sequence[str], every_steps: int) -> None:
        super().__init__(
            time_attr="step",
            metric="score",
            mode="max",
            perturbation_interval=every_steps,
            hyperparam_bounds={key: [0.0, 1.0] for key in keys},
            log_config=False,
            require_attrs=False,
        )
        self._keys = list(keys)

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        trial.config |= {key: trial.config["member"][key] for key in self._keys}
        super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        action = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if action == TrialScheduler.PAUSE else action


class _MemberListener(Listener):
    def __init__(
        self, on_end: Callable[[int, str | None], None], placements: Placements, tell: Callable[[str], None]
    ) -> None:
        super().__init__(placements, tell)
        self._on_end = on_end

    def ended(self, trial: TuneTrial, error: str | None) -> None:
        self._on_end(slot_of(str(trial)), error)


def slot_of(name: str) -> int:
    """A member's place, of its name."""
    return int(name.removeprefix("member-"))
