"""Repeating one step of a run in one process: the steps up to it, and what is printed of it."""

from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dinoray.jobs.cli.config import load_run_config
from dinoray.jobs.runs import replay_lines
from dinoray.jobs.runs.replay_batches import RunBatches
from dinoray.jobs.runs.replay_start import Start, StartOptions, open_start, read_manifest
from dinoray.models.commands import command
from dinoray.models.errors import ConfigError, DataError, ResourceError
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking.bad_image_file import replaced_positions
from dinoray.pipeline.tracking.capture_files import captured, read_capture
from dinoray.pipeline.tracking.records import read_mapping, read_records
from dinoray.pipeline.training.distributed import set_up_device
from dinoray.pipeline.training.non_finite import watched
from dinoray.pipeline.training.rank_shares import RankShares
from dinoray.pipeline.training.skips import LAG, Skips
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.training.step import train_step
from dinoray.pipeline.worker.config import Config

_LAST_LINES = 5
"""Steps before the last one that get a line."""
_NAMED = 3
"""Images that a line names."""


class Logged(NamedTuple):
    """What the run kept of its steps: lines of metrics.jsonl by step, and the capture of the step, if there is one."""

    steps: Mapping[int, Mapping[str, Any]]
    capture: Mapping[str, Any]

    def metrics(self, step: int) -> Mapping[str, Any]:
        """Return the metrics of a step; empty if they were not kept."""
        if step in self.steps or self.capture.get("step") != step:
            return self.steps.get(step, {})
        return self.capture.get("metrics") or {}

    def train_workers(self, step: int) -> int | None:
        """Return the number of train workers that ran a step: as captured, or as the next logged step says."""
        if self.capture.get("step") == step and isinstance(found := self.capture.get("world_size"), int):
            return found
        later = [line for at, line in self.steps.items() if at >= step and "train_workers" in line]
        return int(later[0]["train_workers"]) if later else None

    def skipped_before(self, step: int) -> int | None:
        """Return how many steps had been skipped before a step, if that was logged."""
        before = [line for at, line in self.steps.items() if at < step and "skipped_steps" in line]
        return int(before[-1]["skipped_steps"]) if before else None


def replay(arguments: Namespace) -> None:
    """Restore, run the steps, and print what is seen. Raises DataError if images are not those of the run."""
    run, step = Directory(arguments.run), arguments.step
    kept = load_run_config(run)
    if step is None:
        raise ConfigError(f"--step is missing; {_choose_step(run)}")
    manifest = read_manifest(run, kept)
    steps = {line["step"]: line for line in read_records(run).lines if "loss" in line}
    logged = Logged(steps, read_capture(run, step))
    options = StartOptions(step, arguments.checkpoint, arguments.overrides, _device(arguments.device, kept))
    start = open_start(run, options, num_images=manifest.num_images)
    state, algorithm = start.state, start.state.config
    if step > state.schedule.total_steps:
        raise ConfigError(
            f"--step {step} must be at most {state.schedule.total_steps}, the number of steps of {run.uri}"
        )
    shares = RankShares.of(state, _world_size(start.config, logged.train_workers(step), arguments.overrides))
    state.config = shares.config(algorithm)
    set_up_device(state.device, num_processes=shares.world_size)
    source = Source(start.config.data, manifest, start.config.storage)
    batches = RunBatches(source, algorithm, shares, replaced_positions(run))
    left_out = step - 1 - state.step if arguments.alone else 0
    if left_out:
        skipped = logged.skipped_before(step - LAG)  # those that the step's schedules wait for
        state.step = step - 1
        state.skips = Skips(state.device, total=state.skips.before_lag if skipped is None else skipped)
    first = state.step + 1
    _print(f"warning: {line}" for line in start.refused)
    _print(replay_lines.beginning(run.uri, start.name, state, step, shares, logged.capture))
    with shares.seeding(state):
        _run_up_to(step, state, batches, logged)
        _run_last(step, state, batches, logged, shares, num_images=arguments.images)
    _print(f"note: {line}" for line in _notes(arguments, start, left_out))
    others = {logged.train_workers(at) for at in range(first, step)} - {shares.world_size, None}
    if others:
        numbers = " and ".join(map(str, sorted(filter(None, others))))
        _print(
            [
                f"note: some of the steps up to this one were run by {numbers} train workers, not {shares.world_size}"
            ]
        )
    _print(f"note: {line}" for line in shares.inexact(algorithm))
    _print(f"note: {line}" for line in _other_images(batches, logged.capture))
    environment = read_mapping(run, run_dir.ENVIRONMENT)
    _print(f"note: {line}" for line in replay_lines.other_machine(environment, state.device, logged.capture))
    if batches.lost:
        raise DataError(
            f"{len(batches.lost)} images that the run used in steps {first} to {step} were replaced by others here: "
            f"{'; '.join(batches.lost[:_NAMED])}; restore them, and replay again"
        )


def _run_up_to(step: int, state: TrainState, batches: RunBatches, logged: Logged) -> None:
    """Run the steps before `step`."""
    for at in range(state.step + 1, step):
        metrics = train_step(state, batches.batch(at))
        if at >= step - _LAST_LINES:
            _print([replay_lines.of_step(at, metrics, logged.metrics(at))])


def _run_last(
    step: int,
    state: TrainState,
    batches: RunBatches,
    logged: Logged,
    shares: RankShares,
    *,
    num_images: int,
) -> None:
    """Run `step` and print all that is seen of it, also if it raises an exception."""
    state.skips.settle()
    batch, now, skipped = batches.batch(step), state.settings(), state.skipped
    state.health.read(step - 1, state.dino.center)  # so that the next reading is of this step alone
    with watched(state) as found:
        try:
            metrics = train_step(state, batch)
        except Exception as error:
            _print(
                [
                    "",
                    f"step {step} raises {type(error).__name__}",
                    *replay_lines.of_found(found, batch, shares),
                ]
            )
            _print(["", *replay_lines.of_images(batch, state.config.crops, shares, found, limit=num_images)])
            raise
    health, was = state.health.read(step, state.dino.center), logged.metrics(step)
    _print(["", *replay_lines.of_metrics(step, metrics, was)])
    _print(replay_lines.of_schedule(now, health, skipped=skipped))
    _print(replay_lines.of_found(found, batch, shares))
    _print(["", *replay_lines.of_images(batch, state.config.crops, shares, found, limit=num_images)])
    _print(["", replay_lines.result(metrics, was)])


def _notes(arguments: Namespace, start: Start, left_out: int) -> Iterator[str]:
    """Yield why the result may not be the run's, as the command asked for it."""
    if arguments.overrides:
        yield f"with other settings than the run's: {' '.join(arguments.overrides)}"
    if left_out:
        yield f"--alone leaves out {left_out} of the steps between {start.name} and step {arguments.step}"


def _other_images(batches: RunBatches, capture: Mapping[str, Any]) -> Iterator[str]:
    if batches.regained:
        yield f"replaced by other images in the run, and used here: {', '.join(batches.regained[:_NAMED])}"
    if batches.differ_from(capture):
        yield "the manifest names other images for this step than its capture does"


def _world_size(config: Config, logged: int | None, overrides: Sequence[str]) -> int:
    """Return the number of ranks that the step is divided among: as given, as the run had them, or as configured."""
    is_given = any(one.startswith("resources.train_workers=") for one in overrides)
    return config.resources.most_workers if is_given or logged is None else logged


def _device(name: str | None, config: Config) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ResourceError("--device cuda, but there is no GPU here; pass --device cpu")
    uses_gpu = config.resources.use_gpu is not False and torch.cuda.is_available()
    return torch.device(name or ("cuda" if uses_gpu else "cpu"))


def _choose_step(run: Directory) -> str:
    steps = captured(run)
    if not steps:
        return f"pass --step N, the step to repeat; {run.uri} has captured none"
    shown = ", ".join(f"{step} ({reason})" for step, reason in steps.items())
    first = command("replay", run.uri, "--step", str(min(steps)))
    return f"choose a step, e.g. `{first}`; captured steps: {shown}"


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)
