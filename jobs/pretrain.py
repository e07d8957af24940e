"""Pretrain a backbone with DINO: `python -m jobs.pretrain [--recipe NAME] [--config FILE] [key=value ...]`.

Images -> manifest -> Ray Data multi-crop -> Ray Train DINO -> checkpoints -> k-NN. The same command continues a
run that was killed, and does nothing for a run that is finished.
"""

import contextlib
from collections.abc import Sequence

import ray
from rich.console import Console

from jobs.cli.arguments import PretrainArguments, pretrain_config
from jobs.cli.config import Config, differences, json_schema, load_run_config
from jobs.cli.display import Display
from jobs.cli.keys import keep_detected
from jobs.cli.main import run_main, start_ray
from jobs.cli.print_config import describe_config
from jobs.runs.data_lines import describe_data, describe_evaluation, evaluation_warnings
from jobs.runs.inputs import Inputs
from jobs.runs.result import RESULT, describe_result, write_result
from jobs.runs.run_files import draw_demo, note_hardware, write_about
from jobs.runs.run_size import check_images, check_workers, length_warnings, warmup_warnings
from jobs.runs.train import check_run, run_training, what_is_learnt
from models.errors import ConfigError, DinorayError
from pipeline.augment.config import describe_crops
from pipeline.augment.multicrop import kernel_name
from pipeline.cluster.channel import Board, Event
from pipeline.reporting.run_report import LiveReport, write_report
from pipeline.storage.files import Directory
from pipeline.storage.run_dir import committed_checkpoints
from pipeline.training.config import Schedule
from pipeline.training.published_weights import fetch_published_weights


def main(argv: Sequence[str]) -> None:
    """Parse, check everything that can be checked without a cluster, run, and say where the results are."""
    arguments = PretrainArguments().parse_args(argv)
    if arguments.json_schema:
        print(json_schema())
        return
    if arguments.print_config:
        print(describe_config(Config, arguments), end="")
        return

    config = pretrain_config(arguments)
    console = Console()
    run = Directory(config.storage_path).child(config.name)
    if run.exists("config.yaml"):
        config = keep_detected(config, load_run_config(run))
    if _is_finished(run, config, resume=arguments.resume):
        console.print(f"{run.uri} is finished; choose another name=... to train again", soft_wrap=True)
        console.print(describe_result(run), highlight=False, soft_wrap=True)
        return
    check_run(config)
    if config.backbone.pretrained and not committed_checkpoints(run):
        fetch_published_weights(config)
    warnings = check_workers(config)
    draw_demo(config, console)
    inputs = Inputs.open(config, run)
    warnings += evaluation_warnings(inputs, config.eval)
    num_images = inputs.images.num_images
    if not run.exists("config.yaml"):
        check_images(config, num_images)
    warnings += [*length_warnings(config, num_images), *warmup_warnings(config, num_images)]
    algorithm, weights, reasons = what_is_learnt(config, run, num_images=num_images)
    about_data = [describe_data(inputs.images), describe_evaluation(inputs, config.eval)]
    write_about(run, config, inputs, [*about_data, *reasons])
    schedule = Schedule(algorithm, num_images=num_images)
    chosen = "".join(f"{reason}\n" for reason in reasons)
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
    use_gpu, augment_actors = start_ray(config.resources, verbose=arguments.verbose)
    report = LiveReport(run)
    try:
        with Display(console, title=run.uri) as display:

            def show(event: Event, _: Board) -> None:
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
            )
    finally:
        ray.shutdown()
    write_result(run)
    write_report(run)
    console.print(describe_result(run), highlight=False, soft_wrap=True)


def _is_finished(run: Directory, config: Config, *, resume: bool) -> bool:
    """Whether the run of this name is done. ConfigError when it was started with other settings."""
    if not run.exists("config.yaml"):
        return False
    changed = differences(load_run_config(run), config)
    if changed and not resume:
        is_other_data = any(one.startswith("data.path:") for one in changed)
        remedy = "" if is_other_data else ", or pass --resume to continue it so"
        raise ConfigError(
            f"name={config.name} is in use by a run with other settings ({'; '.join(changed[:3])}"
            f"{'; ...' if len(changed) > 3 else ''}): choose another name=...{remedy}"
        )
    return run.exists(RESULT) and not changed


if __name__ == "__main__":
    run_main(main)
