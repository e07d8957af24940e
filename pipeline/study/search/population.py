"""A population that trains at once while PB2 moves its settings: weak members go on from strong ones' weights.

A member is a sequence of trials: each time it takes over another's
weights it becomes a new one, which begins at that one's checkpoint with parameters that PB2 chose. Tune ends the
process of a member that takes over: its workers are removed here, and what Ray Train had set to watch over them ends
by itself where there is a dashboard.
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

from models.errors import DinorayError, ResourceError, one_line
from pipeline.ray_private.tune import OpenPB2, check_pb2
from pipeline.storage.files import Directory
from pipeline.study.search.tuner import Listener, Placements, Unsaved, run_tune, tell_error
from pipeline.training.checkpoint import own_copy

_POINTER = "pointer.json"
_ALIKE, _ASIDE = 1e-3, 0.2
"""Shares of the range of a setting: what makes no difference, and how far a step aside goes at most."""


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
    max_failures: int,
    seed: int,
    on_end: Callable[[int, str | None], None],
    tell: Callable[[str], None],
) -> None:
    """Train a member from each point of `starts`; weak ones take over from strong ones, as Rounds says.

    ResourceError where scikit-learn or the dashboard, which PB2 needs, is missing.
    """
    np.random.seed(seed)  # the only way in which PB2 takes one
    keys, placements = list(starts[0]), Placements()
    with warnings.catch_warnings():
        # Of a process fitted to few scores, and of processes that are not used again: neither is for a person to mend.
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
            space={
                "member": tune.grid_search([{"slot": slot, **start} for slot, start in enumerate(starts)])
            },
        )


def check_population() -> None:
    """ResourceError unless PB2 has what it needs. On a Ray that is up."""
    check_pb2()
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
            with own_copy(checkpoint) as folder:
                pointer = Pointer(*json.loads((folder / _POINTER).read_text()))
        try:
            self._member(slot, cube, pointer, MemberReport(self._placements, slot))
        except DinorayError as error:
            tell_error(error)


class Rounds:
    """Who takes over from whom: the worst quarter of the members from the best, by scores of the same step.

    A round is a step at which every living member has told its score; members come to it at different times, and
    none waits. A weak one takes over when it tells its next score. The first round judges nobody: PB2 learns from
    changes of the score, and would give the settings of the best to two members.
    """

    def __init__(self) -> None:
        self._scores: dict[int, dict[int, float]] = {}
        self._copied: dict[int, int] = {}  # up to which step a member's scores are those of whom it took over
        self._judged = 0
        self._donors: dict[int, int] = {}

    def told(self, member: int, step: int, score: float, living: Collection[int]) -> int | None:
        """Whom the member takes over from, now that it has told the score of this step (more is better)."""
        self._scores.setdefault(member, {})[step] = score
        steps = set.intersection(*(set(self._scores.get(one, ())) for one in living))
        if len(steps) > 1 and max(steps) > self._judged:
            self._judged = max(steps)
            own = [one for one in living if self._copied.get(one, 0) < self._judged]
            self._donors = self._judge({one: self._scores[one][self._judged] for one in own})
        donor = self._donors.pop(member, None)
        return donor if donor in living else None

    def took_over(self, member: int, donor: int) -> None:
        """The member goes on from where the donor is, with its scores so far; it is judged again by its own."""
        self._scores[member] = dict(self._scores[donor])
        self._copied[member] = max(self._scores[donor])

    def _judge(self, scores: Mapping[int, float]) -> dict[int, int]:
        order = sorted(scores, key=lambda one: scores[one])
        pairs = zip(order, order[::-1], strict=True)  # the worst from the best, the next from the next
        return {
            weak: donor
            for weak, donor in list(pairs)[: min(math.ceil(len(order) / 4), len(order) // 2)]
            if scores[weak] < scores[donor]
        }


class _Population(Unsaved, OpenPB2):
    """PB2 on the unit cube: it chooses the settings, Rounds the members. All of them fit at once: none is paused."""

    def __init__(self, keys: Sequence[str]) -> None:
        super().__init__(
            time_attr="step",
            metric="score",
            mode="max",
            hyperparam_bounds={key: [0.0, 1.0] for key in keys},
            log_config=False,
        )
        self._keys, self._rounds = list(keys), Rounds()

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        if self.knows(trial):  # its process has died and is started again: it is where it was
            return
        trial.config |= {key: trial.config["member"][key] for key in self._keys}
        super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        if "score" not in result:  # an error is told
            return TrialScheduler.CONTINUE
        self.note_result(trial, result["step"], result)
        living = {slot_of(str(one)): one for one in tune_controller.get_trials() if not one.is_finished()}
        member = slot_of(str(trial))
        donor = self._rounds.told(member, result["step"], result["score"], living)
        if donor is None:
            return TrialScheduler.CONTINUE
        self.replace(tune_controller, trial, living[donor])
        self._rounds.took_over(member, donor)
        return TrialScheduler.NOOP  # it is to begin anew

    def new_config(self, trial: TuneTrial, donor: TuneTrial) -> tuple[dict[str, Any], dict[str, Any]]:
        """PB2's choice; of few scores that is now and then just where the donor is, and two that train alike teach
        nothing: then a step aside, as in plain population based training."""
        config, operations = super().new_config(trial, donor)
        if all(abs(config[key] - donor.config[key]) < _ALIKE for key in self._keys):
            aside = np.random.uniform(-_ASIDE, _ASIDE, len(self._keys))
            beside = np.array([config[key] for key in self._keys]) + aside
            moved = 1 - np.abs(1 - np.abs(beside))  # back from the edge that it would be beyond
            config |= dict(zip(self._keys, moved.tolist(), strict=True))
            self.data.loc[self.data.index[-1], self._keys] = moved  # where PB2 has written down what it chose
            self.current[-1] = moved
        return config, operations


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
