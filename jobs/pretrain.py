"""Pretrain a backbone with DINO: `python -m jobs.pretrain [--recipe NAME] [--config FILE] [key=value ...]`.

Images -> manifest -> Ray Data multi-crop -> Ray Train DINO -> checkpoints -> k-NN. The same command continues a
run that was killed, and does nothing for a run that is finished.
"""

import contextlib
import json
import platform
import subprocess
import threading
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import ray
from numpy.typing import NDArray
from rich.console import Console

from jobs.config import Arguments, Config, differences, json_schema, load_config, load_run_config
from jobs.display import Display
from jobs.entry import run_main, start_ray
from jobs.result import RESULT, describe_result, write_result
from models.backbone import build_backbone
from models.interop import Weights
from models.settings import ConfigError, DinorayError
from pipeline.automatic import adapt, resolve
from pipeline.board import Board
from pipeline.checkpoint import committed_checkpoints
from pipeline.contact_sheet import contact_sheet
from pipeline.crops import crop_rng, kernel_name, multi_crop
from pipeline.crops_config import describe_crops
from pipeline.dataset import StreamPlan
from pipeline.decode import BadImage, decode
from pipeline.demo_images import demo_folder, write_demo_images
from pipeline.features import labelled_sources
from pipeline.layout import batch_size_per_worker, check_parts
from pipeline.manifest import load_or_build
from pipeline.order import Order
from pipeline.report import write_report
from pipeline.source import Source
from pipeline.start import read_weights, start_from
from pipeline.storage import Directory
from pipeline.training import DINOConfig, Schedule, build_state
from pipeline.worker import WorkerSpec, fit

_NUM_PICTURES = 4
"""Images whose attention is drawn at each evaluation."""


def main(argv: Sequence[str]) -> None:
    """Parse, check everything that can be checked without a cluster, run, and say where the results are."""
    parser = Arguments("python -m jobs.pretrain", "Pretrain a vision backbone with DINO.")
    parser.add_argument("--init-from", metavar="PATH", default=None, help="the same as init.path=PATH")
    parser.add_argument("--verbose", action="store_true", help="show Ray's own logs")
    arguments = parser.parse_args(argv)
    if arguments.json_schema:
        print(json_schema())
        return
    init = [f"init.path={arguments.init_from}"] if arguments.init_from else []
    config = load_config(arguments.recipe, arguments.config, [*arguments.overrides, *init])
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return

    console = Console()
    run = Directory(config.storage_path).child(config.name)
    if _is_finished(run, config, resume=arguments.resume):
        console.print(f"{run.uri} is finished; choose another name=... to train again", soft_wrap=True)
        console.print(describe_result(run), highlight=False, soft_wrap=True)
        return
    per_worker = batch_size_per_worker(config.train.global_batch_size, config.resources.train_workers)
    check_parts(per_worker, config.train.accumulate_steps)
    build_backbone(
        config.backbone,
        crop_sizes=(*config.crops.crop_sizes, *_eval_sizes(config)),
        drop_path_rate=config.backbone.drop_path_rate,
    )
    if Path(config.data.path).is_relative_to(demo_folder()):
        console.print(f"demo images: {write_demo_images(demo_folder())} in {demo_folder()}", soft_wrap=True)
    source = Source(config.data, load_or_build(config.data, run))
    labelled = labelled_sources(config.data, config.eval, run)
    order = Order(
        source.num_images,
        seed=config.train.seed,
        group_sizes=source.manifest.group_sizes,
        window_groups=_window_groups(source),
    )
    algorithm, weights, reasons = _algorithm(config, run, num_images=source.num_images)
    _write_about(run, config, source, order, reasons)
    schedule = Schedule(algorithm, num_images=source.num_images)
    chosen = "".join(f"{reason}\n" for reason in reasons)
    console.print(
        f"{source.num_images} images in {config.data.path}, {schedule.total_steps} steps of "
        f"{config.train.global_batch_size} images, {config.backbone.name}\n{describe_crops(config.crops)}, "
        f"{kernel_name(config.crops)} kernel\n"
        f"{chosen}run directory {run.uri}",
        highlight=False,
        soft_wrap=True,
    )
    _train(config, algorithm, weights, run, source, labelled, order, console, verbose=arguments.verbose)
    write_result(run)
    write_report(run)
    console.print(describe_result(run), highlight=False, soft_wrap=True)


def _eval_sizes(config: Config) -> list[int]:
    """Sizes of image that the backbone sees in evaluations beside those of the crops."""
    return [config.eval.image_size] if config.eval.val_path and config.eval.image_size else []


def _is_finished(run: Directory, config: Config, *, resume: bool) -> bool:
    """Whether the run of this name is done. ConfigError when it was started with other settings."""
    if not run.exists("config.yaml"):
        return False
    changed = differences(load_run_config(run), config)
    if changed and not resume:
        raise ConfigError(
            f"name={config.name} is in use by a run with other settings ({'; '.join(changed[:3])}"
            f"{'; ...' if len(changed) > 3 else ''}): choose another name=..., or pass --resume to continue it so"
        )
    return run.exists(RESULT) and not changed


def _algorithm(
    config: Config, run: Directory, *, num_images: int
) -> tuple[DINOConfig, Weights | None, list[str]]:
    """What is learnt, with numbers for `auto`; the weights to start from, if any; and a line on each number.

    A run that has checkpoints goes on with what it began with, whatever has become of the file it began from.
    """
    resolved = resolve(config.algorithm(), num_images=num_images)
    if config.init.path is None:
        return resolved.config, None, resolved.reasons
    names = committed_checkpoints(run)
    if names:
        meta = json.loads(run.read(f"checkpoints/{names[-1]}/meta.json"))
        began = DINOConfig.model_validate(meta["config"]).backbone
        return resolved.config.model_copy(update={"backbone": began}), None, resolved.reasons
    weights = read_weights(config.init.path)
    algorithm = adapt(resolved.config, weights)
    # Tried here, where a person sees at once what does not fit.
    start_from(build_state(algorithm, num_images=num_images), weights, config.init.load)
    return algorithm, weights, resolved.reasons


def _pictures(
    labelled: tuple[Source, Source] | None, source: Source, config: Config
) -> list[tuple[str, NDArray[np.uint8]]]:
    """A handful of images, the same for each evaluation: evenly spaced ones of those that are classified, if any."""
    shown = labelled[1] if labelled else source
    spaced = np.linspace(0, shown.num_images - 1, min(_NUM_PICTURES, shown.num_images)).astype(int)
    pictures = []
    for fetched in shown.fetch(spaced.tolist()):
        with contextlib.suppress(BadImage):
            if fetched.data is not None:
                pictures.append((fetched.key, decode(fetched.data, max_pixels=config.data.max_pixels)))
    return pictures


def _window_groups(source: Source) -> int:
    """Parquet row groups among which rows are shuffled: as many as an augment actor can keep in memory."""
    group_bytes = source.manifest.group_bytes
    if group_bytes is None:
        return 1
    return max(1, int(source.config.row_group_cache_bytes // max(1, group_bytes.max())))


def _write_about(
    run: Directory, config: Config, source: Source, order: Order, reasons: Sequence[str]
) -> None:
    """config.yaml, environment.json (with `reasons` of numbers that stand for auto) and crops.png."""
    run.write("config.yaml", config.to_yaml().encode())
    names = ["dinoray", "ray", "torch", "timm", "numpy", "pyarrow", "boto3"]
    names += ["numba", "simplejpeg", "opencv-python-headless"]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    about = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": commit.stdout.strip() or None,
        "packages": {name: _version(name) for name in names},
        "automatic": list(reasons),
    }
    run.write("environment.json", json.dumps(about, indent=1).encode())
    samples = []
    for fetched in source.fetch(order.locate(range(min(6, source.num_images)))[1].tolist()):
        try:
            if fetched.data is not None:
                image = decode(fetched.data, max_pixels=config.data.max_pixels)
                rng = crop_rng(config.train.seed, 0, fetched.key)
                samples.append((fetched.key, image, multi_crop(image, rng, config.crops)))
        except BadImage:
            continue  # counted and named when the run comes to it
    if samples:
        run.write("crops.png", contact_sheet(samples, config.crops))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _train(
    config: Config,
    algorithm: DINOConfig,
    weights: Weights | None,
    run: Directory,
    source: Source,
    labelled: tuple[Source, Source] | None,
    order: Order,
    console: Console,
    *,
    verbose: bool,
) -> None:
    """Start Ray and the workers, show their events until they are done; Ray is shut down whatever happens."""
    use_gpu, augment_actors = start_ray(config.resources, verbose=verbose)
    try:
        board = Board()
        spec = WorkerSpec(
            run=run,
            board=board,
            config=algorithm,
            stream=StreamPlan(
                source=ray.put(source),
                board=board,
                order=order,
                crops=config.crops,
                seed=config.train.seed,
                augment_actors=augment_actors,
                cpus_per_augment_actor=config.resources.cpus_per_augment_actor,
            ),
            checkpoint=config.checkpoint,
            log=config.log,
            eval=config.eval,
            health=config.health,
            init=config.init,
            init_weights=None if weights is None else ray.put(weights),
            pictures=ray.put(_pictures(labelled, source, config)),
            eval_sources=(ray.put(labelled[0]), ray.put(labelled[1])) if labelled else None,
            num_images=source.num_images,
            max_bad_fraction=config.data.max_bad_fraction,
            prefetch_batches=config.resources.prefetch_batches,
            can_restart=config.resources.max_failures != 0,
        )
        outcome: list[BaseException | None] = []

        def run_fit() -> None:
            try:
                fit(spec, config.resources, use_gpu=use_gpu)
                outcome.append(None)
            except BaseException as error:
                outcome.append(error)

        # In a thread, because an error that only a person can mend must not wait for Ray's retries.
        thread = threading.Thread(target=run_fit, daemon=True)
        with Display(console) as display:
            thread.start()
            while thread.is_alive() or outcome:
                event = board.take(timeout_seconds=0.5)
                if event is None:
                    if outcome:
                        break
                elif event.kind == "fatal":
                    raise _WorkerError(event.facts["message"], event.facts["exit_code"])
                elif event.kind == "step":
                    display.step(event.facts)
                elif event.kind == "eval":
                    display.eval(event.facts)
                    with contextlib.suppress(DinorayError):  # at the end it is written in earnest
                        write_report(run)
                elif event.kind == "note":
                    display.note(event.facts["text"])
        if outcome and outcome[0] is not None:
            raise outcome[0]
    finally:
        ray.shutdown()


class _WorkerError(DinorayError):
    """An error that a worker reported, with the exit code that it had there."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


if __name__ == "__main__":
    run_main(main)
