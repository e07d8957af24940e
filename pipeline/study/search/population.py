"""A population of trials under PB2: weak members copy strong members' weights and continue with new settings.

A member is a sequence of trials: each time it copies another member's weights it becomes a new trial. The new
trial starts at the other member's checkpoint with parameters from PB2. Tune ends the process of a member that
copies. The member's workers are removed here; Ray Train's monitor of them ends by itself if there is a
dashboard.
"""

import importlib.util
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.util.state
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler
from ray.util.placement_group import PlacementGroup

from dinoray.models.errors import DinorayError, ResourceError, one_line
from dinoray.pipeline.ray_private.tune import OpenPB2, check_pb2
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.study.search.tuner import (
    NotPickled,
    PlacementGroupRegistry,
    TrialListener,
    run_tune,
    tell_error,
)
from dinoray.pipeline.training.checkpoint import own_copy

_POINTER = "pointer.json"
_ALIKE, _ASIDE = 1e-3, 0.2
"""Shares of a setting's range: the largest negligible difference, and the largest random step."""


class Pointer(NamedTuple):
    """A checkpoint: its trial and its step."""

    number: int
    step: int


class MemberReport:
    """Reports of a member at each evaluation: its score, and the checkpoint that others may copy."""

    def __init__(self, placements: PlacementGroupRegistry, slot: int) -> None:
        self._placements, self._slot = placements, slot

    def placed(self, group: PlacementGroup) -> None:
        """Record the workers' placement group: Tune ends a copying member's process, but not its workers."""
        self._placements.keep(_name(self._slot), group)

    def __call__(self, pointer: Pointer, score: float, scores: Mapping[str, float]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, _POINTER).write_text(json.dumps(pointer))
            tune.report(
                {**scores, "step": pointer.step, "score": score},
                checkpoint=tune.Checkpoint.from_directory(folder),
            )


Member = Callable[[int, Mapping[str, float], Pointer | None, MemberReport], None]
"""(index in the population, point of the unit cube, starting checkpoint, report) -> trains to the end."""


def run_population(
    starts: Sequence[Mapping[str, float]],
    member: Member,
    *,
    study: Directory,
    max_failures: int,
    seed: int,
    on_end: Callable[[int, str | None], None],
    tell: Callable[[str], None],
    check: Callable[[], None],
) -> None:
    """Train one member from each point of `starts`; weak members copy strong members as decided by ExploitRounds.

    Raises ResourceError if scikit-learn or the dashboard, which PB2 needs, is missing.
    """
    np.random.seed(seed)  # PB2 takes its seed only this way
    keys, placements = list(starts[0]), PlacementGroupRegistry()
    with warnings.catch_warnings():
        # Warnings about a process fitted to few scores, and about processes that are not reused: users cannot
        # fix either.
        warnings.filterwarnings("ignore", module=r"sklearn\.|ray\.tune\.tune")
        run_tune(
            _Trainable(member, keys, placements),
            _MemberListener(on_end, placements, tell),
            tune.TuneConfig(
                scheduler=_Population(keys),
                trial_name_creator=_name_of,
                trial_dirname_creator=_name_of,
            ),
            study=study,
            max_failures=max_failures,
            check=check,
            space={
                "member": tune.grid_search([{"slot": slot, **start} for slot, start in enumerate(starts)])
            },
        )


def check_population() -> None:
    """Raise ResourceError unless PB2's requirements are met. Needs a running Ray."""
    check_pb2()
    if importlib.util.find_spec("sklearn") is None:
        raise ResourceError(
            "tune.scheduler=pb2 needs scikit-learn: pip install 'dinoray[pb2]', or set tune.scheduler=asha"
        )
    try:
        # By address, because there may be more than one Ray on this machine.
        ray.util.state.list_nodes(address=ray.get_runtime_context().gcs_address, limit=1, timeout=20)
    except Exception as error:  # of many kinds, by the missing part of the dashboard
        raise ResourceError(
            f"tune.scheduler=pb2 needs Ray's dashboard, to end what watches over a replaced trial ({one_line(error)}); "
            "start the head with it, or set tune.scheduler=asha"
        ) from error


def _name(slot: int) -> str:
    return f"member-{slot}"


def _name_of(trial: TuneTrial) -> str:
    return _name(trial.config["member"]["slot"])


class _Trainable:
    """The function that Tune runs for a member, once more after each copy."""

    __name__ = "member"

    def __init__(self, member: Member, keys: Sequence[str], placements: PlacementGroupRegistry) -> None:
        self._member, self._keys, self._placements = member, keys, placements

    def __call__(self, config: dict[str, Any]) -> None:
        # By its name: a copying member gets the other member's config, apart from PB2's settings.
        slot = slot_of(tune.get_context().get_trial_name())
        cube = {key: config[key] for key in self._keys}
        pointer = None
        if (checkpoint := tune.get_checkpoint()) is not None:
            with own_copy(checkpoint) as folder:
                pointer = Pointer(*json.loads((folder / _POINTER).read_text()))
        try:
            self._member(slot, cube, pointer, MemberReport(self._placements, slot))
        except DinorayError as error:
            tell_error(error)


class ExploitRounds:
    """Copy decisions: the worst quarter of the members copies the best, by scores of the same step.

    A round is a step at which every living member has reported its score. Members reach it at different
    times, and none waits. A weak member copies at its next report. The first round decides nothing: PB2
    learns from changes of the score, and would give the best settings to two members.
    """

    def __init__(self) -> None:
        self._scores: dict[int, dict[int, float]] = {}
        self._copied: dict[int, int] = {}  # up to which step a member's scores are the donor's
        self._judged = 0
        self._donors: dict[int, int] = {}

    def observe(self, member: int, step: int, score: float, living: Collection[int]) -> int | None:
        """Record a member's score (larger is better) at a step; return the member to copy from, or None."""
        self._scores.setdefault(member, {})[step] = score
        steps = set.intersection(*(set(self._scores.get(one, ())) for one in living))
        if len(steps) > 1 and max(steps) > self._judged:
            self._judged = max(steps)
            own = [one for one in living if self._copied.get(one, 0) < self._judged]
            self._donors = self._judge({one: self._scores[one][self._judged] for one in own})
        donor = self._donors.pop(member, None)
        return donor if donor in living else None

    def record_copy(self, member: int, donor: int) -> None:
        """Record that the member continues from the donor with its scores; later rounds use new scores."""
        self._scores[member] = dict(self._scores[donor])
        self._copied[member] = max(self._scores[donor])

    def _judge(self, scores: Mapping[int, float]) -> dict[int, int]:
        order = sorted(scores, key=lambda one: scores[one])
        pairs = zip(order, order[::-1], strict=True)  # worst copies best, second worst second best
        return {
            weak: donor
            for weak, donor in list(pairs)[: min(math.ceil(len(order) / 4), len(order) // 2)]
            if scores[weak] < scores[donor]
        }


class _Population(NotPickled, OpenPB2):
    """PB2 on the unit cube: PB2 chooses settings, ExploitRounds chooses members.

    All members fit at once: none is paused.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        super().__init__(
            time_attr="step",
            metric="score",
            mode="max",
            hyperparam_bounds={key: [0.0, 1.0] for key in keys},
            log_config=False,
        )
        self._keys, self._rounds = list(keys), ExploitRounds()

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        if self.knows(trial):  # its process died and restarted: its state is unchanged
            return
        trial.config |= {key: trial.config["member"][key] for key in self._keys}
        super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        if "score" not in result:  # the result reports an error
            return TrialScheduler.CONTINUE
        self.note_result(trial, result["step"], result)
        living = {slot_of(str(one)): one for one in tune_controller.get_trials() if not one.is_finished()}
        member = slot_of(str(trial))
        donor = self._rounds.observe(member, result["step"], result["score"], living)
        if donor is None:
            return TrialScheduler.CONTINUE
        self.replace(tune_controller, trial, living[donor])
        self._rounds.record_copy(member, donor)
        return TrialScheduler.NOOP  # the member restarts

    def new_config(self, trial: TuneTrial, donor: TuneTrial) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return PB2's choice, or a random step from the donor if the choice equals the donor's settings.

        With few scores PB2 sometimes repeats the donor, and two equal members teach nothing. The step is the
        one of plain population based training.
        """
        config, operations = super().new_config(trial, donor)
        if all(abs(config[key] - donor.config[key]) < _ALIKE for key in self._keys):
            aside = np.random.uniform(-_ASIDE, _ASIDE, len(self._keys))
            beside = np.array([config[key] for key in self._keys]) + aside
            moved = 1 - np.abs(1 - np.abs(beside))  # reflected at the edge
            config |= dict(zip(self._keys, moved.tolist(), strict=True))
            self.data.loc[self.data.index[-1], self._keys] = moved  # overwrite PB2's own record of its choice
            self.current[-1] = moved
        return config, operations


class _MemberListener(TrialListener):
    def __init__(
        self,
        on_end: Callable[[int, str | None], None],
        placements: PlacementGroupRegistry,
        tell: Callable[[str], None],
    ) -> None:
        super().__init__(placements, tell)
        self._on_end = on_end

    def ended(self, trial: TuneTrial, error: str | None) -> None:
        self._on_end(slot_of(str(trial)), error)


def slot_of(name: str) -> int:
    """Return a member's index from its name."""
    return int(name.removeprefix("member-"))
