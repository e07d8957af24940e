"""Pretrain a backbone with DINO: `python -m jobs.pretrain [--recipe NAME] [--config FILE] [key=value ...]`.

Images -> manifest -> Ray Data multi-crop -> Ray Train DINO -> checkpoints -> k-NN. The same command continues a
run that was killed, and does nothing for a run that is finished.
"""

import json
import platform
import subprocess
import threading
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
import yaml
from rich.console import Console

from jobs.config import Arguments, Config, differences, json_schema, load_config, validate
from jobs.display import Display
from jobs.entry import run_main, start_ray
from models.backbone import build_backbone
from models.settings import ConfigError, DataError, DinorayError
from pipeline.board import Board
from pipeline.contact_sheet import contact_sheet
from pipeline.crops import crop_rng, describe_crops, multi_crop
from pipeline.dataset import StreamPlan
from pipeline.decode import BadImage, decode
from pipeline.demo_images import demo_folder, write_demo_images
from pipeline.features import labelled_sources
from pipeline.layout import batch_size_per_worker
from pipeline.manifest import load_or_build
from pipeline.order import Order
from pipeline.source import Source
from pipeline.storage import Directory
from pipeline.training import Schedule
from pipeline.worker import WorkerSpec, fit


def main(argv: Sequence[str]) -> None:
    """Parse, check everything that can be checked without a cluster, run, and say where the results are."""
    parser = Arguments("python -m jobs.pretrain", "Pretrain a vision backbone with DINO.")
    parser.add_argument("--verbose", action="store_true", help="show Ray's own logs")
    arguments = parser.parse_args(argv)
    if arguments.json_schema:
        print(json_schema())
        return
    config = load_config(arguments.recipe, arguments.config, arguments.overrides)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return

    console = Console()
    run = Directory(config.storage_path).child(config.name)
    if _is_finished(run, config, resume=arguments.resume):
        console.print(f"{run.uri} is finished; choose another name=... to train again", soft_wrap=True)
        _print_result(console, run)
        return
    batch_size_per_worker(config.train.global_batch_size, config.resources.train_workers)
    build_backbone(
        config.backbone,
        crop_sizes=(config.crops.global_crop_size, config.crops.local_crop_size),
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
    _write_about(run, config, source, order)
    schedule = Schedule(config, num_images=source.num_images)
    console.print(
        f"{source.num_images} images in {config.data.path}, {schedule.total_steps} steps of "
        f"{config.train.global_batch_size} images, {config.backbone.name}\n{describe_crops(config.crops)}\n"
        f"run directory {run.uri}",
        highlight=False,
        soft_wrap=True,
    )
    _train(config, run, source, labelled, order, console, verbose=arguments.verbose)
    _write_result(run)
    _print_result(console, run)


def _is_finished(run: Directory, config: Config, *, resume: bool) -> bool:
    """Whether the run of this name is done. ConfigError when it was started with other settings."""
    if not run.exists("config.yaml"):
        return False
    old = validate(yaml.safe_load(run.read("config.yaml")))
    changed = differences(old, config)
    if changed and not resume:
        raise ConfigError(
            f"name={config.name} is in use by a run with other settings ({'; '.join(changed[:3])}"
            f"{'; ...' if len(changed) > 3 else ''}): choose another name=..., or pass --resume to continue it so"
        )
    return run.exists("result.json") and not changed


def _window_groups(source: Source) -> int:
    """Parquet row groups among which rows are shuffled: as many as an augment actor can keep in memory."""
    group_bytes = source.manifest.group_bytes
    if group_bytes is None:
        return 1
    return max(1, int(source.config.row_group_cache_bytes // max(1, group_bytes.max())))


def _write_about(run: Directory, config: Config, source: Source, order: Order) -> None:
    """config.yaml, environment.json and crops.png, before anything runs."""
    run.write("config.yaml", config.to_yaml().encode())
    names = ("dinoray", "ray", "torch", "timm", "numpy", "opencv-python-headless", "pyarrow", "boto3")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    about = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": commit.stdout.strip() or None,
        "packages": {name: _version(name) for name in names},
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
            config=config.algorithm(),
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
            eval_sources=(ray.put(labelled[0]), ray.put(labelled[1])) if labelled else None,
            num_images=source.num_images,
            max_bad_fraction=config.data.max_bad_fraction,
            prefetch_batches=config.resources.prefetch_batches,
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


def _write_result(run: Directory) -> None:
    """result.json marks the run as finished: first and last evaluation, and the last step's metrics."""
    records = [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    steps = [r for r in records if "loss" in r]
    if not steps:
        raise DataError(f"{run.join('metrics.jsonl')} holds no training step")
    evaluations = [r for r in records if "majority" in r]
    result: dict[str, Any] = {"steps": steps[-1]["step"], "last": steps[-1]}
    if evaluations:
        result |= {"before": evaluations[0], "after": evaluations[-1]}
    run.write("result.json", json.dumps(result, indent=1).encode())


def _print_result(console: Console, run: Directory) -> None:
    result = json.loads(run.read("result.json"))
    lines = []
    if "after" in result:
        lines += [
            "k-NN accuracy of the teacher, "
            + ", ".join(f"k={k.removeprefix('knn_')}" for k in result["after"] if k.startswith("knn_")),
            f"  before training  {_scores(result['before'])}",
            f"  after {result['steps']} steps  {_scores(result['after'])}",
            f"  majority guess   {result['after']['majority']:.1%}",
        ]
    lines += [
        f"checkpoints       {run.join('checkpoints')}",
        f"crops             {run.join('crops.png')}",
        f"metrics           {run.join('metrics.jsonl')} and tensorboard --logdir {run.join('tensorboard')}",
    ]
    if result["last"]["bad_images"]:
        lines.append(
            f"unusable images   {result['last']['bad_images']}, named in {run.join('quarantine.jsonl')}"
        )
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _scores(scores: dict[str, float]) -> str:
    return "  ".join(f"{v:.1%}" for k, v in scores.items() if k.startswith("knn_"))


if __name__ == "__main__":
    run_main(main)
