"""One pretraining run from its checks to its results: what needs no cluster is checked before Ray starts."""

import contextlib

import ray
from rich.console import Console

from dinoray.jobs.cli.display import Display
from dinoray.jobs.cli.main import start_ray
from dinoray.jobs.runs.choosing import Asked, choose_for_run, is_to_choose, kept_choices, listed_anew
from dinoray.jobs.runs.data_lines import (
    data_lines,
    describe_evaluation,
    describe_reading,
    evaluation_warnings,
)
from dinoray.jobs.runs.result import describe_result, write_result
from dinoray.jobs.runs.run_files import draw_demo, note_hardware, write_about
from dinoray.jobs.runs.run_size import check_images, check_workers, length_warnings, warmup_warnings
from dinoray.models.config import timm_name
from dinoray.models.errors import DinorayError
from dinoray.pipeline.augment.crops_table import describe_crops
from dinoray.pipeline.augment.multicrop import kernel_name
from dinoray.pipeline.cluster.channel import Event, RunChannel
from dinoray.pipeline.cluster.lost_ray import leave_ray
from dinoray.pipeline.reporting.run_report import LiveReport, write_report
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory, check_writable
from dinoray.pipeline.storage.lease_keeper import LeaseKeeper
from dinoray.pipeline.storage.run_dir import committed_checkpoints
from dinoray.pipeline.tracking.records import read_records
from dinoray.pipeline.training.config import Schedule
from dinoray.pipeline.training.published_weights import fetch_published_weights
from dinoray.pipeline.worker.config import Config
from dinoray.pipeline.worker.driver import check_run, run_training, what_is_learnt
from dinoray.pipeline.worker.inputs import Inputs


def pretrain(config: Config, lease: LeaseKeeper, *, verbose: bool, asked: Asked | None = None) -> None:
    """Check, run to the end or from where the run was left, and say where the results are.

    `lease`: of the run's directory; held from the first file that is written to the last. `asked`: what `config`
    follows from, once the recipe auto has looked at the images.
    """
    console, run = Console(), Directory(config.storage_path).child(config.name)
    is_open = asked is not None and is_to_choose(config, run)
    warnings = [] if is_open else _check(config, run)
    check_writable(config.storage_path, setting="storage_path")
    with lease:
        draw_demo(config, console)
        if is_open and asked is not None:
            config = choose_for_run(config, asked, run)
            warnings = _check(config, run)
        _pretrain(config, lease, console, run, warnings, verbose=verbose)


def _check(config: Config, run: Directory) -> list[str]:
    """Return warnings about the train workers. Raises what `check_run` and `check_workers` raise."""
    check_run(config)
    is_published = config.backbone.pretrained or timm_name(config.init.path) is not None
    if is_published and not committed_checkpoints(run):
        fetch_published_weights(config, init_path=config.init.path)
    return check_workers(config)


def _pretrain(
    config: Config,
    lease: LeaseKeeper,
    console: Console,
    run: Directory,
    warnings: list[str],
    *,
    verbose: bool,
) -> None:
    inputs = Inputs.open(config, run)
    warnings += evaluation_warnings(inputs, config.eval)
    num_images = inputs.images.num_images
    if not run.exists(run_dir.CONFIG):
        with listed_anew(run):
            check_images(config, num_images, inputs.images.manifest.ignored)
    warnings += [*length_warnings(config, num_images), *warmup_warnings(config, num_images)]
    algorithm, weights, reasons = what_is_learnt(config, run, num_images=num_images, measured=inputs.measured)
    about_data = [*data_lines(inputs.images), describe_evaluation(inputs, config.eval)]
    write_about(run, config, inputs, [*about_data, *reasons])
    schedule = Schedule(algorithm, num_images=num_images)
    by_recipe = kept_choices(config, run)
    chosen = "".join(f"{line}\n" for line in [*(by_recipe.lines if by_recipe else []), *reasons])
    console.print(
        "".join(f"{line}\n" for line in about_data)
        + "".join(f"warning: {line}\n" for line in warnings)
        + f"{schedule.total_steps} steps of {config.train.global_batch_size} images, {config.backbone.name}\n"
        f"{describe_crops(config.crops)}, "
        f"{kernel_name(config.crops)} kernel\n"
        f"{chosen}run directory {run.uri}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    use_gpu, augment_actors = start_ray(config.resources, verbose=verbose, num_streams=config.data.streams)
    for line in describe_reading(inputs.images, config, most_actors=augment_actors[1]):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    report = LiveReport(run)
    try:
        first = next(iter(read_records(run).lines), None)
        with Display(console, title=run.uri, start=first) as display:

            def show(event: Event, _: RunChannel) -> None:
                if event.kind == "step":
                    display.step(event.facts)
                elif event.kind == "eval":
                    display.eval(event.facts)
                    with contextlib.suppress(DinorayError):  # at the end it is written in earnest
                        note_hardware(run, ray.nodes())
                        report.update()
                elif event.kind == "note":
                    display.note(event.facts["text"])

            run_training(
                config,
                algorithm,
                weights,
                run,
                inputs,
                use_gpu=use_gpu,
                augment_actors=augment_actors,
                on_event=show,
                fence=lease.fence,
                check=lease.check,
            )
    finally:
        leave_ray()
    lease.fence.check()
    patient = run.patient(config.storage.give_up_after_seconds)
    write_result(patient)
    write_report(patient)
    console.print(describe_result(run), highlight=False, soft_wrap=True)
