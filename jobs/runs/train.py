"""One training run on a Ray that is up: what it reads, what it learns, and its events until it is done.

Shared by the job that pretrains and by the trials of a study, which read the same inputs.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import ray
from numpy.typing import NDArray

from jobs.cli.config import Config
from jobs.cli.keys import flatten
from jobs.cli.lost_ray import LostRayError, error_to_print, last_words
from models.backbone import build_backbone
from models.errors import one_line
from models.published.checkpoint import Weights
from pipeline.training.auto import adapt, resolve
from pipeline.cluster.channel import Board, Event, fatal_error
from pipeline.evaluation.class_names import Mismatch, class_mismatch
from pipeline.stream.ray_data import StreamPlan
from pipeline.data.decode import BadImage, decode
from pipeline.data.detection import AUTO
from pipeline.evaluation.features import labelled_sources
from pipeline.evaluation.labels import held_out
from pipeline.data.partition import batch_size_per_worker, check_parts
from pipeline.data.manifest import load_or_build
from pipeline.data.order import Order
from pipeline.reporting.run_report import write_report
from pipeline.storage.run_dir import committed_checkpoints, committed_steps
from pipeline.stream.shared_stream import SharedStream
from pipeline.data.source import Source
from pipeline.training.init_weights import INIT_LINE, read_weights, start_from
from pipeline.storage.files import Directory
from pipeline.tracking.services import check_trackers
from pipeline.training.step import DINOConfig, build_state
from pipeline.worker.worker import fit
from pipeline.worker.spec import WorkerSpec

_NUM_PICTURES = 4
"""Images whose attention is drawn at each evaluation."""


_END_SECONDS = 60.0
"""Within which workers that all came to the same error have ended."""


@dataclass(frozen=True)
class Inputs:
    """The images of a run: those that it learns from, and those that it is evaluated on, if any."""

    images: Source
    labelled: tuple[Source, Source] | None
    mismatch: Mismatch | None = None
    """Validation classes without training images; `labelled` is None where no class is shared."""

    @classmethod
    def open(cls, config: Config, directory: Directory) -> "Inputs":
        """List them, or read the manifests that `directory` keeps of an earlier listing."""
        images = Source(config.data, load_or_build(config.data, directory))
        labelled = evaluated_images(config, images, directory)
        mismatch = class_mismatch(*labelled, config.eval) if labelled else None
        return cls(images, None if mismatch and mismatch.is_disjoint else labelled, mismatch)

    def order(self, seed: int) -> Order:
        """The order in which a run of this seed takes the images."""
        manifest = self.images.manifest
        # Parquet row groups among which rows are shuffled: as many as an augment actor can keep in memory.
        window = 1
        if manifest.group_bytes is not None:
            window = max(
                1, int(self.images.config.row_group_cache_bytes // max(1, manifest.group_bytes.max()))
            )
        return Order(
            self.images.num_images, seed=seed, group_sizes=manifest.group_sizes, window_groups=window
        )

    def pictures(self) -> list[tuple[str, NDArray[np.uint8]]]:
        """A handful, the same for each evaluation: evenly spaced ones of those that are classified, if any are."""
        shown = self.labelled[1] if self.labelled else self.images
        spaced = np.linspace(0, shown.num_images - 1, min(_NUM_PICTURES, shown.num_images)).astype(int)
        pictures = []
        for fetched in shown.fetch(spaced.tolist()):
            with contextlib.suppress(BadImage):
                if fetched.data is not None:
                    pictures.append((fetched.key, decode(fetched.data, max_pixels=shown.config.max_pixels)))
        return pictures


def evaluated_images(
    config: Config, images: Source | None, directory: Directory | None = None
) -> tuple[Source, Source] | None:
    """Labelled images that vote and labelled images that are classified: those that the settings name, else a held-out
    part of `images`; None where there are no labels."""
    named = labelled_sources(config.data, config.eval, directory)
    if images is None or config.eval.val_path != AUTO:
        return named
    limits = {"max_train_images": config.eval.max_train_images, "max_val_images": config.eval.max_val_images}
    return held_out(images, **limits)


def check_run(config: Config) -> None:
    """ConfigError when the batch cannot be divided, the network cannot be built or take the crops, or a tracker is not
    there."""
    check_trackers(config.track)
    per_worker = batch_size_per_worker(config.train.global_batch_size, config.resources.train_workers)
    check_parts(per_worker, config.train.accumulate_steps)
    eval_sizes = [config.eval.image_size] if config.eval.image_size else []
    build_backbone(
        config.backbone,
        crop_sizes=(*config.crops.crop_sizes, *eval_sizes),
        drop_path_rate=config.backbone.drop_path_rate,
    )


def what_is_learnt(
    config: Config, run: Directory, *, num_images: int
) -> tuple[DINOConfig, Weights | None, list[str]]:
    """Return the algorithm, with numbers for `auto`; the weights to start from, if any; and lines on both.

    A run that has checkpoints continues with what it began with, whatever has become of the file it began from.
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
    lines = start_from(build_state(algorithm, num_images=num_images), weights, config.init.load)
    return algorithm, weights, [*resolved.reasons, *(f"{INIT_LINE}{line}" for line in lines)]


def stream_plan(
    config: Config,
    inputs: Inputs,
    images: "ray.ObjectRef[Source]",
    board: Board,
    *,
    augment_actors: tuple[int, int],
) -> StreamPlan:
    """What the run's stream is; `images` are those of `inputs`."""
    return StreamPlan(
        source=images,
        board=board,
        order=inputs.order(config.train.seed),
        crops=config.crops,
        seed=config.train.seed,
        augment_actors=augment_actors,
        cpus_per_augment_actor=config.resources.cpus_per_augment_actor,
        cool_down_seconds=config.resources.cool_down_seconds,
    )


@contextlib.contextmanager
def _reported(run: Directory) -> Iterator[None]:
    """Write the page also for a run that is stopped or ended by an error: how far it came, and why it ended."""

    def end(ending: str) -> None:
        with contextlib.suppress(Exception):  # the error that ended the run is the one to report
            write_report(run, ending=ending)

    def end_lost(loss: LostRayError) -> None:
        loss.remedy = _how_to_resume(run)
        end(one_line(loss))

    try:
        with last_words(end_lost):
            yield
    except LostRayError:
        raise
    except KeyboardInterrupt:
        end("Ctrl-C or SIGTERM")
        raise
    except BaseException as error:
        end(one_line((error_to_print(error) if isinstance(error, Exception) else None) or error))
        raise


def _how_to_resume(run: Directory) -> str:
    try:
        step = max(committed_steps(run), default=0)
    except Exception:  # storage may be gone too
        return "the same command continues the run"
    return f"the same command continues from step {step}"


def run_training(
    config: Config,
    algorithm: DINOConfig,
    weights: Weights | None,
    run: Directory,
    inputs: Inputs,
    *,
    use_gpu: bool,
    augment_actors: tuple[int, int],
    on_event: Callable[[Event, Board], None],
    asks: bool = False,
    draws: bool = True,
    name: str | None = None,
    shared: SharedStream | None = None,
) -> int | None:
    """Train to the end, None, or to the step where it was told to stop. Ctrl-C stops it there, with a checkpoint.

    `on_event` gets each event but fatal ones, which are raised.
    `asks`: after each evaluation the workers wait for `board.answer`. `draws`: attention and
    embeddings are shown there too.
    `name`: what gauges and trackers call the run, if it is not the config's.
    `shared`: a stream of just these crops, which other runs take part in.
    """
    board = Board()
    images = ray.put(inputs.images)
    settings = config.model_dump(mode="json") | algorithm.model_dump(mode="json")
    spec = WorkerSpec(
        name=name or config.name,
        run=run,
        board=board,
        config=algorithm,
        stream=stream_plan(config, inputs, images, board, augment_actors=augment_actors),
        shared=shared,
        checkpoint=config.checkpoint,
        log=config.log,
        track=config.track,
        params=dict(flatten(settings)),
        eval=config.eval,
        probe=config.probe,
        health=config.health,
        cost=config.cost,
        init=config.init,
        init_weights=None if weights is None else ray.put(weights),
        pictures=ray.put(inputs.pictures() if draws else []),
        eval_sources=(ray.put(inputs.labelled[0]), ray.put(inputs.labelled[1])) if inputs.labelled else None,
        num_images=inputs.images.num_images,
        max_bad_fraction=config.data.max_bad_fraction,
        prefetch_batches=config.resources.prefetch_batches,
        can_restart=config.resources.max_failures != 0,
        asks=asks,
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
    thread.start()
    trains, stopped_at = False, None

    def follow() -> None:
        nonlocal trains, stopped_at
        while thread.is_alive() or outcome:
            event = board.take(timeout_seconds=0.5)
            if event is None:
                if outcome:
                    break
            elif event.kind == "fatal":
                error = fatal_error(event)
                if error.all_processes_raise_it:
                    thread.join(_END_SECONDS)  # the workers end by themselves, and nothing is left of them
                raise error
            else:
                trains |= event.kind == "step"
                if event.kind == "stopped":
                    stopped_at = event.facts["step"]
                on_event(event, board)
        if outcome and outcome[0] is not None:
            raise outcome[0]

    with _reported(run):
        try:
            follow()
        except KeyboardInterrupt:
            if not trains:
                raise
            board.stop()
            on_event(Event("note", {"text": "stopping with a checkpoint; once more ends it without"}), board)
            follow()
            raise KeyboardInterrupt(
                "the last checkpoint" if stopped_at is None else f"step {stopped_at}"
            ) from None
    return stopped_at
