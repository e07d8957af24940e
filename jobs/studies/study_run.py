"""A study from what its directory holds to its end: plan, search, confirm, findings.

All of its state is the directory of its trials: each time it starts it reads them, and goes on with those that had
begun, then with new ones, then with the best again under other seeds.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import ray
from rich.console import Console

from dinoray.jobs.cli.main import join_ray
from dinoray.jobs.runs.run_files import note_hardware
from dinoray.jobs.studies.config import (
    StudyConfig,
    candidate,
    grace_steps,
    num_trials,
    schedule_of,
    trial_config,
)
from dinoray.jobs.studies.lines import about_study, describe_search, trial_line
from dinoray.jobs.studies.resources import local_cores, lost_outcome, plan_of
from dinoray.jobs.studies.trial import TrialRunner
from dinoray.models.errors import ConfigError, DinorayError
from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.cluster.lost_ray import leave_ray
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.lease_keeper import LeaseKeeper
from dinoray.pipeline.stream.shared_stream import SharedStream
from dinoray.pipeline.study.findings.ranking import searched
from dinoray.pipeline.study.findings.summary import findings
from dinoray.pipeline.study.objective import Objective
from dinoray.pipeline.study.page.study_report import write_study_report
from dinoray.pipeline.study.search import progress
from dinoray.pipeline.study.search.plan import StudyPlan
from dinoray.pipeline.study.search.population import check_population, run_population
from dinoray.pipeline.study.search.samplers import sampler
from dinoray.pipeline.study.search.tuning import AshaConfig, Search, run_trials
from dinoray.pipeline.study.space import Space, place
from dinoray.pipeline.study.trials import (
    BEST,
    OUTCOME,
    Outcome,
    Trial,
    TrialRecord,
    read_study,
    read_trials,
    trial_directory,
    write_outcome,
    write_study,
    write_trial,
)
from dinoray.pipeline.worker.driver import stream_plan
from dinoray.pipeline.worker.inputs import Inputs

_REPORT_SECONDS = 60.0
"""Least time between two reports of a study that goes on."""


class StudyRun:
    """One life of a study."""

    def __init__(
        self,
        config: StudyConfig,
        directory: Directory,
        space: Space,
        objective: Objective,
        first: Sequence[Mapping[str, Any]],
        inputs: Inputs,
        console: Console,
        lease: LeaseKeeper,
    ) -> None:
        self._lease = lease
        self._config, self._directory, self._space = config, directory, space
        self._objective, self._inputs, self._console = objective, inputs, console
        num_images = inputs.images.num_images
        shape = trial_config(config, {}, name="0", storage_path="trials", seed=0, num_images=num_images)
        self._schedule = schedule_of(shape, num_images=num_images)
        self._grace_steps = grace_steps(config, space, num_images=num_images)
        self._num_trials = num_trials(config, space)
        self._propose = sampler(
            config.tune.searcher,
            space,
            seed=config.tune.seed,
            first=first,
            num_trials=self._num_trials,
            grid_points=config.tune.grid_points,
        )
        self._before = float(read_study(directory).get("seconds", 0.0))
        self._began = time.monotonic()
        self._reported = self._began
        self._plan: StudyPlan | None = None
        self._ended: dict[int, TrialRecord] = {}
        self._about = about_study(
            config,
            space,
            objective,
            total_steps=self._schedule.total_steps,
            grace_steps=self._grace_steps,
            num_images=num_images,
            num_trials=self._num_trials,
        )
        self._worst = objective.worst(self._about["out_dim"])

    def is_done(self) -> bool:
        """Whether every trial that is asked for has ended, and the best are confirmed."""
        tried = self._tried()
        ended = all(t.outcome for t in tried) and len(searched(tried)) >= self._num_trials
        return ended and not self._confirmations(tried)

    def run(self, *, verbose: bool) -> None:
        """Search and confirm, on a cluster that is joined or a Ray of one's own, which is shut down in any case."""
        tune = self._config.tune
        join_ray(local_cores(self._config), verbose=verbose, dashboard=tune.scheduler == "pb2")
        try:
            have = ray.cluster_resources()
            self._plan = plan_of(self._config, self._num_trials, have)
            self._about["plan"] = asdict(self._plan) | {"cpus_for_data": self._plan.cpus_for_data}
            self._console.print(describe_search(self._directory, self._about))
            self._console.print(self._plan.describe())
            self._write_study()
            note_hardware(self._directory, ray.nodes())
            runner = TrialRunner(
                self._directory,
                self._config,
                [ray.put(self._inputs)],
                self._objective,
                self._plan,
                self._lease.fence,
            )
            seed = self._config.train.seed
            with self._sharing(runner, seed) as sharing:
                if tune.scheduler == "pb2":
                    self._populate(sharing)
                else:
                    halving = AshaConfig(self._grace_steps, tune.reduction_factor, self._schedule.total_steps)
                    asha = halving if tune.scheduler == "asha" else None
                    self._search(sharing, self._next_trial, {seed}, asha)
            while confirming := self._to_confirm():
                top, seeds = tune.confirm_top, tune.confirm_seeds
                self._console.print(f"confirming the best {top} trials with {seeds} seeds each")
                self._confirm(runner, sorted({trial.seed for trial in confirming}))
        finally:
            leave_ray()

    def write_findings(self) -> None:
        """study.json, best.yaml where there is a best, else none of an earlier one, and the report."""
        self._write_study()
        found = findings(self._tried(), read_study(self._directory))
        if found.best is not None:
            best = candidate(self._config, found.best.params)
            best = best.model_copy(update={"name": f"{self._config.name}-best"})
            self._directory.write(BEST, best.to_yaml().encode())
        else:
            self._directory.delete(BEST)
        write_study_report(self._directory)

    def _confirm(self, runner: TrialRunner, seeds: Sequence[int]) -> None:
        """Run what has begun of these seeds; where streams are shared, one seed after the other."""
        for part in [[seed] for seed in seeds] if self._config.tune.share_stream else [seeds]:
            with self._sharing(runner, part[0]) as sharing:
                self._search(sharing, lambda: None, part)

    def _to_confirm(self) -> list[Trial]:
        """Trials that confirm and have not ended: those that had begun, and new ones, which are remembered."""
        tried = self._tried()
        new = self._confirmations(tried)
        for trial in new:
            write_trial(self._directory, trial)
        return [t.trial for t in tried if t.outcome is None and t.trial.confirms is not None] + new

    def _tried(self) -> list[TrialRecord]:
        """All trials; those that have ended do not change, and are read once."""
        tried = read_trials(self._directory, ended=self._ended)
        self._ended |= {t.trial.number: t for t in tried if t.outcome}
        return tried

    @contextlib.contextmanager
    def _sharing(self, runner: TrialRunner, seed: int) -> Iterator[TrialRunner]:
        """The runner, with a stream that trials of this seed share, if they are to; it ends with the block."""
        if not self._config.tune.share_stream:
            yield runner
            return
        assert self._plan is not None
        config = self._config.model_copy(
            update={"train": self._config.train.model_copy(update={"seed": seed})}
        )
        plan = stream_plan(
            config,
            self._inputs,
            ray.put(self._inputs.images),
            RunChannel(),
            augment_actors=self._plan.augment_actors,
        )
        shared = SharedStream(
            plan,
            num_actors=self._plan.augment_actors[1],
            window_bytes=self._config.tune.share_stream_bytes,
        )
        try:
            yield replace(runner, shared=shared)
        finally:
            shared.close()
            if plan.readers is not None:
                plan.readers.close()

    def _search(
        self,
        runner: TrialRunner,
        new: Callable[[], Trial | None],
        seeds: Collection[int],
        halving: AshaConfig | None = None,
    ) -> None:
        """Run the trials of these seeds that had begun, then those that `new` gives."""
        assert self._plan is not None
        tried = self._tried()
        waiting = [t for t in tried if t.outcome is None and t.trial.seed in seeds]
        queue = [t.trial for t in waiting]
        run_trials(
            Search(
                propose=lambda: queue.pop(0) if queue else new(),
                on_end=self._on_end,
                tell=self._console.print,
                check=self._lease.check,
                ended={
                    t.trial.number: progress.course(t, self._objective) for t in searched(tried) if t.outcome
                },
                begun={
                    t.trial.number: progress.committed_course(self._directory, t, self._objective)
                    for t in waiting
                },
            ),
            runner,
            study=self._directory,
            num_trials=len(queue) + self._num_trials,  # `propose` knows when there is none left
            trials_at_once=self._plan.trials_at_once,
            halving=halving,
            max_failures=self._config.tune.max_failures,
        )

    def _confirmations(self, tried: Sequence[TrialRecord]) -> list[Trial]:
        tune = self._config.tune
        # A population finds a course of settings, not a point that another seed could repeat.
        top = 0 if tune.scheduler == "pb2" else tune.confirm_top
        return progress.confirmations(tried, top=top, num_seeds=tune.confirm_seeds)

    def _populate(self, runner: TrialRunner) -> None:
        """Train a population, each member from its newest trial, or from a point that is proposed."""
        assert self._plan is not None
        size = self._num_trials
        check_population()
        newest = {t.trial.number % size: t.trial for t in self._tried()}
        starts = [
            progress.member_start(self._space, newest[slot])
            if slot in newest
            else place(self._space, self._propose(slot, [])[0])
            for slot in range(size)
        ]

        def ended(slot: int, error: str | None) -> None:
            mine = [t for t in self._tried() if t.trial.number % size == slot]
            if mine:
                self._on_end(mine[-1].trial, error)

        run_population(
            starts,
            runner.member,
            study=self._directory,
            max_failures=self._config.tune.max_failures,
            seed=self._config.tune.seed,
            on_end=ended,
            tell=self._console.print,
            check=self._lease.check,
        )

    def _next_trial(self) -> Trial | None:
        """A new trial, remembered; parameters that do not go together have failed before they begin."""
        while True:
            tried = self._tried()
            nth = len(searched(tried))
            if nth >= self._num_trials:
                return None
            params, origin = self._propose(nth, progress.known(tried, self._objective, worst=self._worst))
            trial = Trial(progress.next_number(tried), params, self._config.train.seed, origin)
            self._lease.fence.check()
            write_trial(self._directory, trial)
            try:
                candidate(self._config, params)
            except ConfigError as error:
                outcome = Outcome("failed", None, 0, message=str(error))
                write_outcome(self._directory, trial, outcome)
                self._on_end(trial, None)
                continue
            return trial

    def _on_end(self, trial: Trial, error: str | None) -> None:
        if error is not None and not trial_directory(self._directory, trial).exists(OUTCOME):
            assert self._plan is not None
            write_outcome(self._directory, trial, lost_outcome(self._directory, trial, error, self._plan))
        (tried,) = (t for t in self._tried() if t.trial.number == trial.number)
        self._console.print(trial_line(tried, self._about))
        self._write_study()
        if time.monotonic() - self._reported > _REPORT_SECONDS:
            with contextlib.suppress(DinorayError):  # at the end it is written in earnest
                write_study_report(self._directory)
            self._reported = time.monotonic()

    def _write_study(self) -> None:
        """study.json, with what an earlier life knew. LostLeaseError where the study is another driver's by now."""
        self._lease.fence.check()
        about = {**self._about, "seconds": self._before + time.monotonic() - self._began}
        write_study(self._directory, read_study(self._directory) | about)
