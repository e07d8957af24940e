"""Evaluations beside training: an actor of its own has a copy of the teacher, while the train workers go on.

Without CPUs of its own it takes what the other processes leave: it runs at a low priority on the node with most CPUs.
It ends with the train worker that started it, rank 0; what was under way then is asked for again when the run goes on.
A lost one is replaced.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
import torch
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import nn

from dinoray.models.errors import DinorayError, one_line
from dinoray.models.lora import merged
from dinoray.pipeline.cluster.channel import known_error
from dinoray.pipeline.evaluation.features import Shares
from dinoray.pipeline.evaluation.in_training import Evaluation, evaluate
from dinoray.pipeline.ray_private.nodes import staying_nodes
from dinoray.pipeline.storage.waiting import report_outages
from dinoray.pipeline.tracking.scalar_names import PUBLISHED
from dinoray.pipeline.training.checkpoint import FrozenBackbone
from dinoray.pipeline.training.distributed import set_up_device
from dinoray.pipeline.worker.spec import WorkerSpec
from dinoray.pipeline.worker.under_way import TimeLimit, UnderWay

_TRIES = 3
_LOW_PRIORITY = 10
"""Added to the niceness of an evaluator without CPUs of its own."""
_PENDING_SECONDS = 60.0
"""Time without a node for the evaluator after which a line says so."""

Weights = Mapping[str, NDArray[Any]]
"""A backbone's parameters and buffers by name."""


def evaluate_step(
    spec: WorkerSpec, backbone: nn.Module, step: int, *, shares: Shares | None = None
) -> Evaluation | None:
    """Evaluate the teacher's backbone after `step`, as `evaluate` does: what every evaluation of a run is."""
    return _evaluate(spec, backbone, ray.get(spec.pictures), title=f"step {step}", shares=shares)


def published_scores(spec: WorkerSpec, backbone: nn.Module) -> dict[str, float]:
    """Evaluate the initial weights with the preprocessing they were published with; none if it is the run's own.

    Call on all ranks; the first one gets the scores, their names prefixed.
    """
    if spec.published is None:
        return {}
    found = _evaluate(spec, backbone, [], title="", preprocessing=spec.published)
    return {f"{PUBLISHED}{name}": score for name, score in found.scores.items()} if found else {}


def _evaluate(spec: WorkerSpec, backbone: nn.Module, pictures: Any, **how: Any) -> Evaluation | None:
    labelled = spec.eval_sources
    lidar = spec.eval.measures_lidar(labelled=labelled is not None, from_weights=spec.starts_from_weights)
    return evaluate(
        backbone,
        (ray.get(labelled[0]), ray.get(labelled[1])) if labelled else None,
        ray.get(spec.stream.source),
        pictures,
        algorithm=spec.config,
        config=spec.eval.model_copy(update={"lidar": lidar}),
        probe=spec.probe,
        **how,
    )


def copy_of(backbone: nn.Module) -> "ray.ObjectRef[Weights]":
    """Copy a backbone's weights, with adapters merged, to the object store: all that training waits for."""
    state = merged(backbone.state_dict())
    weights = {name: value.detach().cpu().numpy() for name, value in state.items()}
    return ray.put(weights)


class _Evaluator:
    """The actor."""

    def __init__(self, spec: WorkerSpec, num_ranks: int, *, trains_on_cpus: bool) -> None:
        report_outages(spec.channel.note_outage)
        self._spec, self._num_ranks = spec, num_ranks
        self._device = torch.device("cuda" if spec.resources.evaluator_gpus else "cpu")
        # As many threads as a train worker has: another number may add up in another order.
        set_up_device(self._device, num_processes=num_ranks if trains_on_cpus else 1)
        cpus = spec.resources.evaluator_cpus
        if cpus:
            torch.set_num_threads(max(1, int(cpus)))
        else:
            os.nice(_LOW_PRIORITY)

    def evaluate(self, step: int, weights: Weights) -> Evaluation | DinorayError | None:
        """Evaluate; an error that a person can act on is a result: Ray would forward only its text."""
        copies = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
        backbone = FrozenBackbone(self._spec.config, copies).backbone(self._device)
        try:
            return evaluate_step(self._spec, backbone, step, shares=Shares.of_all_ranks(self._num_ranks))
        except DinorayError as error:
            return error


class SideEvaluations:
    """Rank 0's evaluator, and what is under way there. Its methods are for the training thread."""

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        num_ranks: int,
        trains_on_cpus: bool,
        log: Callable[[int, Evaluation], None],
        miss: Callable[[int, str], None],
        note: Callable[[str], None],
    ) -> None:
        """`log` takes a step and its evaluation, in the order of steps, `miss` a step and why it has none, `note` a
        line for the user."""
        self._spec, self._num_ranks, self._trains_on_cpus = spec, num_ranks, trains_on_cpus
        self._log, self._miss, self._note = log, miss, note
        self._under_way: UnderWay[ray.ObjectRef[Weights]] = UnderWay(
            most=spec.eval.max_under_way, most_tries=_TRIES
        )
        self._limit = TimeLimit(spec.eval.timeout_minutes, outage_seconds=spec.give_up_after_seconds)
        self._actor: ActorHandle | None = None
        self._answer: ray.ObjectRef[Evaluation | DinorayError | None] | None = None
        self._start: ray.ObjectRef[Any] | None = None
        """Ready once the actor has started; None from then on."""
        self._started_at, self._has_told, self._has_waited = 0.0, False, False

    @property
    def steps(self) -> list[int]:
        """The steps whose evaluations are under way, ascending."""
        return self._under_way.steps

    def add(self, step: int, weights: "ray.ObjectRef[Weights]") -> None:
        """Ask for an evaluation."""
        self._under_way.add(step, weights)
        self.look()

    def has_room(self, wait_seconds: float) -> bool:
        """Return whether one more may be asked for, after at most `wait_seconds`. If not, a line says what is waited
        for."""
        self.look()
        if self._under_way.has_room:
            self._has_waited = False
            return True
        if not self._has_waited:
            self._has_waited = True
            self._note(
                f"training waits for the evaluation of step {self.steps[0]}, of which {self._spec.eval.max_under_way} "
                "may be under way: give the evaluator more by resources.evaluator_cpus or resources.evaluator_gpus, or "
                "raise eval.max_under_way or eval.every_steps"
            )
        self.look(wait_seconds)
        return self._under_way.has_room

    def look(self, wait_seconds: float = 0.0) -> None:
        """Log what has arrived, and have the next one begun. Waits for the oldest one for at most `wait_seconds`.

        Raises the error of an evaluation that a person can act on, as an evaluation by the train workers does.
        """
        while (oldest := self._under_way.oldest) is not None:
            if self._answer is None:
                if self._actor is None:
                    self._begin_actor()
                assert self._actor is not None
                self._answer = self._actor.evaluate.remote(oldest.step, oldest.weights)
                self._limit.begin(time.monotonic())
            if not ray.wait([self._answer], timeout=wait_seconds)[0]:
                self._check_start()
                self._check_time()
                return
            self._take(oldest.step)

    def _take(self, step: int) -> None:
        assert self._answer is not None
        answer, self._answer, self._start = self._answer, None, None
        try:
            found = ray.get(answer)
        except RayTaskError as error:
            if (known := known_error(error)) is not None:  # of its start, such as missing packages
                raise known from error
            self._lose(one_line(error.cause))
            return
        except RayError as error:
            is_memory = isinstance(error, OutOfMemoryError)
            self._lose("memory ran out on its node" if is_memory else "its process or its node was lost")
            return
        if isinstance(found, DinorayError):
            raise found
        self._under_way.arrived()
        self._limit.arrived(time.monotonic())
        if found is not None:
            self._log(step, found)

    def _lose(self, why: str, *, for_good: bool = False) -> None:
        """End the evaluator, so that another one is started; give up the oldest evaluation, or have it begun again."""
        step = self.steps[0]
        with contextlib.suppress(Exception):  # mostly it has ended already
            ray.kill(self._actor)
        self._actor = self._answer = self._start = None
        if self._under_way.failed(for_good=for_good):
            self._miss(step, why if for_good else f"it failed {_TRIES} times: {why}")
        else:
            self._note(f"the evaluation of step {step} is begun again: {why}")

    def _begin_actor(self) -> None:
        resources = self._spec.resources
        if resources.evaluator_cpus or resources.evaluator_gpus:
            # Not in the train workers' placement group, which has no room.
            options: dict[str, Any] = {"scheduling_strategy": "DEFAULT"}
        else:
            node = spare_node(staying_nodes(), ray.get_runtime_context().get_node_id())
            there = NodeAffinitySchedulingStrategy(node, soft=True)
            options = {"scheduling_strategy": there}
        remote = ray.remote(_Evaluator).options(
            num_cpus=resources.evaluator_cpus, num_gpus=resources.evaluator_gpus, **options
        )
        self._actor = remote.remote(self._spec, self._num_ranks, trains_on_cpus=self._trains_on_cpus)
        self._start, self._started_at, self._has_told = (
            self._actor.__ray_ready__.remote(),
            time.monotonic(),
            False,
        )

    def _check_start(self) -> None:
        """Say that there is no room for the evaluator, and give up at last; nothing once it has started."""
        if self._start is None:
            return
        if ray.wait([self._start], timeout=0)[0]:
            self._start = None
            self._limit.begin(time.monotonic())
            return
        waited, resources = time.monotonic() - self._started_at, self._spec.resources
        if waited < _PENDING_SECONDS:
            return
        why = f"the evaluator has not started for {waited:.0f} s"
        if resources.evaluator_cpus or resources.evaluator_gpus:
            why += f", which needs {resources.evaluator_cpus:g} CPUs and {resources.evaluator_gpus:g} GPUs of one node"
        if waited > 60 * resources.wait_for_nodes_minutes:
            self._lose(why, for_good=True)
        elif not self._has_told:
            self._has_told = True
            self._note(f"warning: {why}")

    def _check_time(self) -> None:
        """Replace an evaluator that takes too long: one that hangs holds up training, and the end of the run."""
        if self._answer is None or self._start is not None or not self._limit.is_over(time.monotonic()):
            return
        minutes = self._limit.seconds / 60
        self._lose(
            f"it took longer than {minutes:g} minutes; if it needs more, set eval.timeout_minutes={2 * minutes:g}"
        )


def spare_node(nodes: Iterable[Mapping[str, Any]], here: str) -> str:
    """Return the id of the node for an evaluator without CPUs of its own: the one with most, of equals the one with
    fewest GPUs; `here` where none has any.

    `nodes` are as Ray lists them.
    """

    def worth(node: Mapping[str, Any]) -> tuple[float, float, str]:
        return node["Resources"]["CPU"], -node["Resources"].get("GPU", 0), node["NodeID"]

    able = [node for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
    return str(max(able, key=worth)["NodeID"]) if able else here
