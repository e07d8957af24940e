"""What one trial of a study does in its own process: train its run, tell of each evaluation, remember the outcome.

The same trial run again goes on from its last checkpoint, and does nothing but remember what it had come to if it was
done. It ends itself where it is told to, so that nothing of it is left.
"""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from dinoray.jobs.runs.result import write_result
from dinoray.jobs.runs.run_files import write_environment
from dinoray.jobs.studies.config import StudyConfig, space_of, trial_config
from dinoray.models.errors import ConfigError, DataError, DinorayError, ResourceError
from dinoray.models.settings import number
from dinoray.pipeline.cluster.channel import Event, RunChannel
from dinoray.pipeline.reporting.run_report import write_report
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.lease import LostLeaseError
from dinoray.pipeline.storage.lease_keeper import Fence
from dinoray.pipeline.storage.run_dir import checkpoint_name, committed_steps
from dinoray.pipeline.stream.shared_stream import SharedStream
from dinoray.pipeline.study.objective import Objective
from dinoray.pipeline.study.search.plan import StudyPlan
from dinoray.pipeline.study.search.population import MemberReport, Pointer
from dinoray.pipeline.study.search.tuner import remove_left_group
from dinoray.pipeline.study.search.tuning import Report
from dinoray.pipeline.study.space import at
from dinoray.pipeline.study.trials import (
    OUTCOME,
    Outcome,
    Trial,
    evaluations,
    read_trials,
    trial_directory,
    write_outcome,
    write_trial,
)
from dinoray.pipeline.tracking.records import read, read_records
from dinoray.pipeline.training.verdict import UnhealthyError, Verdict
from dinoray.pipeline.worker.driver import run_training, what_is_learnt
from dinoray.pipeline.worker.inputs import Inputs

_COMMIT_SECONDS = 120.0
"""Ray commits a checkpoint some seconds after it was taken."""

CLOCK = "clock.json"
"""Of a trial so far: seconds over all attempts, where its workers are, the step at which it was told to stop."""


@dataclass(frozen=True)
class TrialRunner:
    """What all trials of a study share; called once for each attempt at one."""

    study: Directory
    config: StudyConfig
    inputs: "list[ray.ObjectRef[Inputs]]"
    """In a list: Ray would put a bare reference's object in its place."""
    objective: Objective
    plan: StudyPlan
    fence: Fence
    """Of the study's directory."""
    shared: SharedStream | None = None

    def __call__(self, trial: Trial, report: Report) -> None:
        """Train, and write the outcome. Errors of data or resources that meet the first trials are raised."""
        self._run(trial, lambda: _Attempt(self, trial, report, placed=report.placed))

    def member(
        self, slot: int, cube: Mapping[str, float], pointer: Pointer | None, report: MemberReport
    ) -> None:
        """A member of a population: the trial that it is at, or a new one that goes on from another's checkpoint."""
        trial = self._current(slot, cube, pointer)

        def tell(step: int, score: float, scores: Mapping[str, float]) -> bool:
            report(Pointer(trial.number, step), score, scores)
            return True

        self._run(trial, lambda: _Attempt(self, trial, tell, placed=report.placed))

    def _current(self, slot: int, cube: Mapping[str, float], pointer: Pointer | None) -> Trial:
        """The member's newest trial, or a new one where it takes over another's weights, which ends those before."""
        mine = [t for t in read_trials(self.study) if t.trial.number % self.config.tune.trials == slot]
        params, seed = at(space_of(self.config), cube), self.config.train.seed
        newest = mine[-1].trial if mine else None
        if newest is None:
            trial = Trial(slot, params, seed, "pb2")
        elif pointer is None or pointer in (
            (newest.number, pointer.step),
            (newest.continues, newest.from_step),
        ):
            trial = newest
        else:
            number, donor = newest.number + self.config.tune.trials, pointer.number
            trial = Trial(number, params, seed, "pb2", continues=donor, from_step=pointer.step)
        if trial is not newest:
            write_trial(self.study, trial)
        for left in mine:
            if left.outcome is None and left.trial.number != trial.number:
                why = f"replaced by a copy of trial {trial.continues:04d} (step {trial.from_step})"
                attempt = _Attempt(self, left.trial, lambda *_: True)
                write_outcome(self.study, left.trial, attempt.outcome("stopped", message=why))
        return trial

    def _run(self, trial: Trial, begin: Callable[[], "_Attempt"]) -> None:
        """Nothing for a trial that has ended: its process died before anybody heard."""
        if trial_directory(self.study, trial).exists(OUTCOME):
            return
        attempt = None
        try:
            attempt = begin()
            attempt.train()
            outcome = attempt.outcome("stopped" if attempt.stopped else "finished")
        except LostLeaseError:
            raise  # the study is another driver's, and so is this outcome
        except UnhealthyError as error:
            assert attempt is not None  # it trained
            outcome = attempt.outcome("collapsed", verdict=error.verdict, message=str(error))
        except DinorayError as error:
            alone = isinstance(error, ConfigError | ResourceError) or trial.continues is not None
            if not alone and not self._any_has_trained():
                raise  # of the data, as it seems: it would meet every trial
            if attempt is None:  # settings that do not go together, or another's checkpoint that is gone
                outcome = Outcome("failed", None, 0, message=str(error))
            else:
                outcome = attempt.outcome("failed", message=str(error))
        write_outcome(self.study, trial, outcome)

    def _any_has_trained(self) -> bool:
        return any(t.outcome and t.outcome.status != "failed" for t in read_trials(self.study))


Tell = Callable[[int, float, Mapping[str, float]], bool]
"""(step, score, all scores) -> whether the trial goes on."""


class _Attempt:
    def __init__(
        self,
        runner: TrialRunner,
        trial: Trial,
        tell: Tell,
        *,
        placed: Callable[[Any], None] = lambda group: None,
    ) -> None:
        patience = runner.config.storage.give_up_after_seconds
        run = trial_directory(runner.study, trial).patient(patience)
        self._runner, self._run, self._tell, self._placed = runner, run, tell, placed
        self._began = time.monotonic()
        self._clock = {"seconds": 0.0, "start_seconds": 0.0} | json.loads(read(run, CLOCK) or b"{}")
        self._inputs: Inputs = ray.get(runner.inputs[0])
        self._config = trial_config(
            runner.config,
            trial.params,
            name=trial.name,
            storage_path=runner.study.join("trials"),
            seed=trial.seed,
            num_images=self._inputs.images.num_images,
            init=self._origin(trial),
        )
        self.stopped = False
        self._out_dim = 2
        self._last: dict[str, Any] = {}

    def train(self) -> None:
        """From the last checkpoint to the end, or to where it is told to stop."""
        run, config = self._run, self._config
        inputs = self._inputs
        learnt, weights, reasons = what_is_learnt(
            config, run, num_images=inputs.images.num_images, measured=inputs.measured
        )
        self._out_dim = number(learnt.head.out_dim)
        if run.exists(run_dir.RESULT):
            return
        self.stopped = self._clock.get("stopped") in committed_steps(run)
        if self.stopped:
            return
        run.write(run_dir.CONFIG, config.to_yaml().encode())
        write_environment(run, config, reasons)
        if "group" in self._clock:
            remove_left_group(self._clock["group"])
        plan = self._runner.plan
        stopped_at = run_training(
            config,
            learnt,
            weights,
            run,
            self._inputs,
            use_gpu=plan.gpus_each > 0,
            augment_actors=plan.augment_actors,
            on_event=self._on_event,
            fence=self._runner.fence,
            waits_for_decision=self._runner.config.tune.scheduler != "pb2",
            shows_images=False,
            name=f"{self._runner.config.name}/{config.name}",
            shared=self._runner.shared,
        )
        self.stopped = stopped_at is not None
        if not self.stopped:
            write_result(run)
        with contextlib.suppress(DinorayError):
            write_report(run)

    def outcome(self, status: Any, *, verdict: Verdict = Verdict.HEALTHY, message: str = "") -> Outcome:
        """Of what the run has logged."""
        records = read_records(self._run)
        found = evaluations(records)
        scores = found[max(found)] if found else {}
        score = self._score({} if status == "collapsed" else scores)
        plan, seconds = self._runner.plan, self._seconds()
        return Outcome(
            status=status,
            score=None if status == "failed" else score,
            step=records.last_step or 0,
            verdict=verdict.value,
            message=message,
            scores=scores,
            seconds=seconds,
            start_seconds=self._clock["start_seconds"],
            cpu_hours=plan.cpus_each * seconds / 3600,
            gpu_hours=plan.gpus_each * seconds / 3600,
        )

    def _origin(self, trial: Trial) -> dict[str, Any] | None:
        """Where the weights come from, if from another trial; returns once that checkpoint is committed.

        One that was lost on the way gives place to the newest that the other trial has.
        """
        if trial.continues is None:
            return None
        donor = trial_directory(self._runner.study, Trial(trial.continues, {}, 0, ""))
        deadline = time.monotonic() + _COMMIT_SECONDS
        while trial.from_step not in (steps := committed_steps(donor)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)
        step = max((step for step in steps if step <= trial.from_step), default=None)
        if step is None:
            raise DataError(
                f"{donor.uri} has no checkpoint for trial {trial.name} to start from; search again under another "
                "name=..."
            )
        return {"path": donor.join(run_dir.CHECKPOINTS, checkpoint_name(step)), "load": "run"}

    def _score(self, scores: Mapping[str, float]) -> float:
        """The worst there is for a metric that is missing or not finite."""
        score = self._runner.objective.score(scores)
        return self._runner.objective.worst(self._out_dim) if score is None else score

    def _on_event(self, event: Event, channel: RunChannel) -> None:
        facts = event.facts
        if event.kind == "placed":
            self._clock["group"] = facts["group"].id.hex()
            self._write_clock()
            self._placed(facts["group"])
        elif event.kind == "step":
            if not self._clock["start_seconds"]:
                self._clock["start_seconds"] = self._seconds()
            self._last = facts
        elif event.kind == "eval":
            step, scores = facts["step"], {k: float(v) for k, v in facts.items() if k != "step"}
            scores |= {"loss": self._last["loss"]} if "loss" in self._last else {}
            self._write_clock()
            # The last one is not told: it would end the trial before its run is complete.
            if step and step < self._last.get("total_steps", 0):
                should_continue = self._tell(step, self._score(scores), scores)
                if (
                    not should_continue
                ):  # remembered: a process that dies now must not be asked to decide again
                    self._clock["stopped"] = step
                    self._write_clock()
                elif "stopped" in self._clock:  # an earlier attempt's, lost before it was heard
                    del self._clock["stopped"]
                    self._write_clock()
                channel.answer(step, go_on=should_continue)

    def _write_clock(self) -> None:
        self._run.write(CLOCK, json.dumps(self._clock | {"seconds": self._seconds()}).encode())

    def _seconds(self) -> float:
        return self._clock["seconds"] + time.monotonic() - self._began
