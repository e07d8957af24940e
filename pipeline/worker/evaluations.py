"""The evaluations of a run: by its train workers, which stand meanwhile, or by an evaluator beside them."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import ray

from dinoray.models.errors import DinorayError, one_line
from dinoray.pipeline.evaluation.published import start_warnings
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import checkpoint_name, committed_steps
from dinoray.pipeline.training.checkpoint import download_checkpoint, read_frozen
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.worker.agreement import Agreement
from dinoray.pipeline.worker.ending import Ending
from dinoray.pipeline.worker.evaluator import (
    SideEvaluations,
    Weights,
    copy_of,
    evaluate_step,
    published_scores,
)
from dinoray.pipeline.worker.outputs import Outputs
from dinoray.pipeline.worker.spec import WorkerSpec
from dinoray.pipeline.worker.under_way import due_between

_WAIT_SECONDS = 1.0
"""Time for which rank 0 waits for an evaluation before it tells the others that it still does."""


class Evaluations:
    """The evaluations of a run. All ranks call it alike; rank 0, which has `outputs`, logs.

    Beside training, all but that before the first step are made: then nothing trains yet, and what is wrong with the
    images or the settings is found at once.
    """

    def __init__(
        self,
        state: TrainState,
        spec: WorkerSpec,
        outputs: Outputs | None,
        agreement: Agreement,
        *,
        num_ranks: int,
        ending: Ending | None,
    ) -> None:
        self._state, self._spec, self._outputs, self._agreement = state, spec, outputs, agreement
        self._ending = ending
        self.are_beside = spec.eval.where == "side"
        """Whether an evaluator makes them while training continues."""
        self._side: SideEvaluations | None = None
        if outputs and self.are_beside:
            self._side = SideEvaluations(
                spec,
                num_ranks=num_ranks,
                trains_on_cpus=state.device.type == "cpu",
                log=outputs.log_evaluation,
                miss=outputs.miss_evaluation,
                note=outputs.note,
            )

    @property
    def under_way(self) -> list[int]:
        """The steps whose evaluations are under way, on rank 0."""
        return self._side.steps if self._side else []

    def metrics(self) -> dict[str, float]:
        """Return the number of evaluations under way, where they are made beside training."""
        return {"evaluations_under_way": len(self.under_way)} if self.are_beside else {}

    def evaluate_start(self) -> None:
        """Evaluate the initial weights: the line that the run is to beat, also with their published preprocessing."""
        backbone = self._state.dino.teacher.backbone
        published = published_scores(self._spec, backbone)
        self.evaluate_here(published)
        if self._outputs and (start := self._outputs.start):
            for line in start_warnings(
                start,
                self._spec.published,
                self._spec.config.crops,
                from_weights=self._spec.starts_from_weights,
            ):
                self._outputs.note(f"warning: {line}")

    def evaluate_here(self, more: Mapping[str, float] = MappingProxyType({})) -> None:
        """Evaluate on the train workers, which wait for it; `more` scores are logged with those found."""
        step = self._state.step
        evaluation = evaluate_step(self._spec, self._state.dino.teacher.backbone, step)
        if self._outputs:
            if evaluation:
                self._outputs.log_evaluation(step, evaluation._replace(scores={**evaluation.scores, **more}))
            self._outputs.restart_meters()

    def evaluate(self) -> None:
        """Evaluate this step, or have it evaluated while training continues."""
        if not self.are_beside:
            self.evaluate_here()
            return
        # In short turns: others would wait for rank 0 in a collective, which has a time limit.
        while not self._agreement.is_everywhere(self._has_room()):
            pass
        if self._side:
            self._side.add(self._state.step, copy_of(self._state.dino.teacher.backbone))

    def look(self) -> None:
        """Log the evaluations that have arrived; does not wait."""
        if self._side:
            self._side.look()

    def wait(self, check: Callable[[], None]) -> None:
        """After the last step, return when none is under way, or the run is to stop; call `check` meanwhile."""
        while self._side and self._side.steps and not (self._ending and self._ending.is_stop()):
            self._side.look(_WAIT_SECONDS)
            check()

    def tell_left(self) -> None:
        """Tell which evaluations are left to the next start of a run that stops."""
        if self._outputs and self.under_way:
            steps = ", ".join(map(str, self.under_way))
            self._outputs.note(f"evaluations under way, of step {steps}, are repeated when the run goes on")

    def resume(self) -> None:
        """Have evaluated what was under way when the run was left, from its checkpoints; else tell what is missing."""
        lost = self._lost()
        if not self.are_beside and not self._agreement.is_everywhere(self._state.step not in lost):
            self.evaluate_here()  # the run was asked to end, and had saved first
            lost = [step for step in lost if step != self._state.step]
        for step in lost:
            assert self._outputs is not None
            found = _weights_of(self._spec.run, step) if self._side else "it was lost when the run was left"
            if isinstance(found, str):
                self._outputs.miss_evaluation(step, found)
            else:
                assert self._side is not None
                self._side.add(step, ray.put(found))

    def _has_room(self) -> bool:
        """Whether training may go on. Who is asked to end does: it asks for one more, which its next start repeats."""
        is_asked = self._ending is not None and self._ending.is_asked()
        return self._side is None or is_asked or self._side.has_room(_WAIT_SECONDS)

    def _lost(self) -> list[int]:
        """On rank 0, the steps of this run that were to be evaluated and have no scores."""
        if self._outputs is None or not self._spec.has_scores:
            return []
        total, every = self._state.schedule.total_steps, self._spec.eval.every_steps
        due = due_between(self._outputs.begun_at, self._state.step, total=total, every=every)
        return [step for step in due if step not in self._outputs.evaluated]


def _weights_of(run: Directory, step: int) -> Weights | str:
    """Return the weights of the teacher's backbone in a checkpoint, or why there are none."""
    if step not in committed_steps(run):
        return "it was under way when the run was left, and there is no checkpoint of that step"
    folder = run.child(run_dir.CHECKPOINTS).child(checkpoint_name(step))
    try:
        with tempfile.TemporaryDirectory(prefix="dinoray-evaluation-") as scratch:
            files = (run_dir.TEACHER, run_dir.META)
            network = read_frozen(download_checkpoint(folder, Path(scratch), files), address=folder.uri)
    except DinorayError as error:
        return one_line(error)
    return {name: value.numpy() for name, value in network.weights.items()}
