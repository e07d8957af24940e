"""One training run on a Ray that is up: what it reads, what it learns, and its events until it is done.

Shared by the job that pretrains and by the trials of a study, which read the same inputs.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import ray

from dinoray.models.backbone import build_backbone
from dinoray.models.config import timm_name
from dinoray.models.errors import ConfigError, one_line
from dinoray.models.partial import freeze
from dinoray.models.published.checkpoint import Weights
from dinoray.models.settings import flatten
from dinoray.pipeline.augment.config import crop_bytes
from dinoray.pipeline.cluster.channel import EndRequest, Event, RunChannel, fatal_error
from dinoray.pipeline.cluster.lost_ray import LostRayError, error_to_print, last_words
from dinoray.pipeline.cluster.nodes import least_store_bytes
from dinoray.pipeline.data.measured import NOTHING, Measured
from dinoray.pipeline.data.partition import (
    BLOCK_BYTES,
    batch_size_per_worker,
    block_bytes_for,
    check_accumulation,
    check_streams,
    lay_out,
)
from dinoray.pipeline.data.reading.sharing import share_reading
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.published import published_preprocessing
from dinoray.pipeline.ray_private.train_controller import ControllerCallback
from dinoray.pipeline.reporting.run_report import write_report
from dinoray.pipeline.storage.checkpoint_files import newest_meta
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.lease import LostLeaseError
from dinoray.pipeline.storage.lease_keeper import Fence
from dinoray.pipeline.storage.run_dir import committed_steps, mend_snapshot, remove_leftovers
from dinoray.pipeline.stream.ray_data import StreamPlan
from dinoray.pipeline.stream.readers import Readers
from dinoray.pipeline.stream.shared_stream import SharedStream
from dinoray.pipeline.tracking.services import check_trackers
from dinoray.pipeline.training.auto import has_auto, resolve
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.init_weights import INIT_LINE, load_initial_weights, read_weights
from dinoray.pipeline.training.match_weights import adapt
from dinoray.pipeline.training.published_weights import check_start
from dinoray.pipeline.training.state import build_state
from dinoray.pipeline.worker.config import Config
from dinoray.pipeline.worker.fit import CONTROLLER, fit
from dinoray.pipeline.worker.inputs import Inputs
from dinoray.pipeline.worker.spec import WorkerSpec
from dinoray.pipeline.worker.watches import Watches

_END_SECONDS = 120.0
"""Longest wait for workers that all met the same error; they may upload a checkpoint."""
_KILL_SECONDS = 20.0
"""Longest wait for Ray Train's controller to start, and to end once it is killed."""


def check_run(config: Config) -> None:
    """ConfigError when the batch or the stream cannot be divided, the network cannot be built or take the crops, or a
    tracker is not there."""
    check_trackers(config.track)
    check_start(config.init, config.backbone)
    resources = config.resources
    check_streams(
        config.data.streams, train_workers=resources.least_workers, most_actors=resources.actor_range[1]
    )
    for workers in sorted(set(resources.worker_range)):
        per_worker = batch_size_per_worker(config.train.global_batch_size, workers)
        check_accumulation(per_worker, config.train.accumulate_steps)
    eval_sizes = [config.eval.image_size] if config.eval.image_size else []
    backbone = build_backbone(
        config.backbone,
        crop_sizes=(*config.crops.crop_sizes, *eval_sizes),
        drop_path_rate=config.backbone.drop_path_rate,
        in_chans=config.crops.channels,
    )
    part = config.backbone.train
    if part != "all" and config.init.path is None and not config.backbone.pretrained:
        raise ConfigError(
            f"backbone.train={part} leaves most weights as they are, and they are random; set "
            "backbone.pretrained=true or init.from=FILE, or set backbone.train=all"
        )
    freeze(backbone, config.backbone, crop_size=min(config.crops.crop_sizes))


def what_is_learnt(
    config: Config, run: Directory, *, num_images: int, measured: Measured = NOTHING
) -> tuple[DINOConfig, Weights | None, list[str]]:
    """Return the algorithm, with numbers for `auto`; the weights to start from, if any; and lines on both.

    A run that has checkpoints continues with what it began with, whatever has become of the file it began from.
    `measured`: of the samples in its images.
    """
    algorithm, began = config.algorithm(), None
    if has_auto(algorithm) or config.init.path is not None:
        meta = newest_meta(run)
        began = None if meta is None else DINOConfig.model_validate(meta["config"])
    resolved = resolve(algorithm, num_images=num_images, measured=measured, began=began)
    if config.init.path is None:
        return resolved.config, None, resolved.reasons
    if began is not None:
        return resolved.config.model_copy(update={"backbone": began.backbone}), None, resolved.reasons
    weights = read_weights(config.init.path)
    algorithm = adapt(resolved.config, weights)
    # Load here, where a person sees at once what does not fit.
    lines = load_initial_weights(build_state(algorithm, num_images=num_images), weights, config.init.load)
    return algorithm, weights, [*resolved.reasons, *(f"{INIT_LINE}{line}" for line in lines)]


def stream_plan(
    config: Config,
    inputs: Inputs,
    images: "ray.ObjectRef[Source]",
    channel: RunChannel,
    *,
    augment_actors: tuple[int, int],
    is_read: bool = True,
) -> StreamPlan:
    """What the run's stream is; `images` are those of `inputs`. Starts what fetches for all actors, if the order has
    windows and the stream `is_read`, which it is not beside a shared one."""
    order, resources = inputs.images.order(config.train.seed), config.resources
    # Trials that share a stream must agree on its blocks, whenever they start.
    block_bytes = block_bytes_for(least_store_bytes(ray.nodes())) if is_read else BLOCK_BYTES
    sharing = share_reading(
        inputs.images.manifest,
        order,
        most_actors=augment_actors[1],
        cpus_per_actor=resources.cpus_per_augment_actor,
        rows_per_block=lay_out(
            range(1),
            world_size=resources.most_workers,
            global_batch_size=config.train.global_batch_size,
            image_bytes=crop_bytes(config.crops),
            block_bytes=block_bytes,
        ).rows_per_block,
        num_streams=config.data.streams,
    )
    return StreamPlan(
        source=images,
        channel=channel,
        order=order,
        crops=config.crops,
        seed=config.train.seed,
        augment_actors=augment_actors,
        cpus_per_augment_actor=config.resources.cpus_per_augment_actor,
        cool_down_seconds=config.resources.cool_down_seconds,
        num_streams=config.data.streams,
        readers=Readers.start(sharing, channel) if sharing is not None and is_read else None,
        block_bytes=block_bytes,
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
    except (LostRayError, LostLeaseError):  # for the latter, the page is another driver's
        raise
    except KeyboardInterrupt:
        end("Ctrl-C or SIGTERM")
        raise
    except BaseException as error:
        end(one_line((error_to_print(error) if isinstance(error, Exception) else None) or error))
        raise


@contextlib.contextmanager
def _ended(fit: threading.Thread, channel: RunChannel, readers: Readers | None) -> Iterator[None]:
    """Upon an error, end what still trains: a thread that waits inside Ray when Ray is shut down crashes the process.

    That matters to a process that lives on, such as a notebook's.
    """
    try:
        yield
    except LostRayError:
        raise
    except BaseException:
        deadline = time.monotonic() + (_KILL_SECONDS if ControllerCallback else 0)
        while fit.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(Exception):  # the error that ended the run is the one to report
                controller = channel.get(CONTROLLER)
                if controller is not None:
                    ray.kill(controller)
            fit.join(0.2)
        raise
    finally:
        with contextlib.suppress(Exception):
            channel.put(CONTROLLER, None)  # it holds the channel too: neither would end
        with contextlib.suppress(Exception):
            if readers is not None:
                readers.close()


def _how_to_resume(run: Directory) -> str:
    try:
        step = max(committed_steps(run), default=0)
    except Exception:  # storage may be gone too
        return "the same command resumes the run"
    return f"the same command resumes from step {step}"


def run_training(
    config: Config,
    algorithm: DINOConfig,
    weights: Weights | None,
    run: Directory,
    inputs: Inputs,
    *,
    use_gpu: bool,
    augment_actors: tuple[int, int],
    on_event: Callable[[Event, RunChannel], None],
    fence: Fence,
    check: Callable[[], None] = lambda: None,
    waits_for_decision: bool = False,
    shows_images: bool = True,
    name: str | None = None,
    shared: SharedStream | None = None,
) -> int | None:
    """Train to the end, None, or to the step where it was told to stop. Ctrl-C stops it there, with a checkpoint.

    `on_event` gets each event but fatal ones, which are raised.
    `fence`: of the directory that the driver holds. `check` is called twice a second; what it raises ends the run.
    `waits_for_decision`: after each evaluation the workers wait for `channel.answer`. `shows_images`: attention
    and embeddings are shown there too.
    `name`: what gauges and trackers call the run, if it is not the config's.
    `shared`: a stream of just these crops, which other runs take part in.
    """
    channel = RunChannel()

    def note(text: str | None) -> None:
        if text is not None:
            on_event(Event("note", {"text": text}), channel)

    if (mended := mend_snapshot(run)) is None:
        remove_leftovers(run)
    note(mended)
    images = ray.put(inputs.images)
    settings = config.model_dump(mode="json") | algorithm.model_dump(mode="json", exclude={"data", "init"})
    stream = stream_plan(
        config, inputs, images, channel, augment_actors=augment_actors, is_read=shared is None
    )
    spec = WorkerSpec(
        name=name or config.name,
        run=run.patient(config.storage.give_up_after_seconds),
        channel=channel,
        config=algorithm,
        stream=stream,
        shared=shared,
        checkpoint=config.checkpoint,
        log=config.log,
        track=config.track,
        params=dict(flatten(settings)),
        eval=config.eval,
        probe=config.probe,
        health=config.health,
        cost=config.cost,
        resources=config.resources,
        init=config.init,
        init_weights=None if weights is None else ray.put(weights),
        published=published_preprocessing(
            algorithm,
            from_file=weights is not None and not weights.is_own,
            timm_weights=None if weights is None else timm_name(config.init.path),
        ),
        pictures=ray.put(inputs.pictures() if shows_images else []),
        eval_sources=(ray.put(inputs.labelled[0]), ray.put(inputs.labelled[1])) if inputs.labelled else None,
        num_images=inputs.images.num_images,
        give_up_after_seconds=config.storage.give_up_after_seconds,
        max_bad_fraction=config.data.max_bad_fraction,
        prefetch_batches=config.resources.prefetch_batches,
        can_restart=config.resources.max_failures != 0,
        fence=fence,
        waits_for_decision=waits_for_decision,
    )
    outcome: list[BaseException | None] = []

    def run_fit() -> None:
        try:
            fit(spec, config.resources, use_gpu=use_gpu)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    # In a thread, because an error that only a person can mend must not wait for Ray's retries.
    thread = threading.Thread(target=run_fit, name="fit", daemon=True)
    thread.start()
    trains, stopped_at = False, None
    watches = Watches(config, channel, use_gpu=use_gpu, is_shared=shared is not None)

    def follow() -> None:
        nonlocal trains, stopped_at
        while thread.is_alive() or outcome:
            check()
            event = channel.take(timeout_seconds=0.5)
            for line in watches.look():
                note(line)
            if event is None:
                if outcome:
                    break
                continue
            if event.kind == "fatal":
                error = fatal_error(event)
                if error.raised_by_all_ranks:
                    thread.join(_END_SECONDS)  # the workers end by themselves, and nothing is left of them
                raise error
            note(watches.hear(event))
            if event.kind in ("lost", "resumed"):
                continue
            trains = trains or event.kind == "step"
            if event.kind == "stopped":
                stopped_at = event.facts["step"]
            on_event(event, channel)
        if outcome and outcome[0] is not None:
            raise outcome[0]

    with _reported(run), _ended(thread, channel, stream.readers):
        try:
            follow()
        except KeyboardInterrupt:
            if not trains:
                raise
            channel.request_end(EndRequest())
            note("stopping after a checkpoint; press Ctrl-C again to stop at once")
            follow()
            raise KeyboardInterrupt(
                "the last checkpoint" if stopped_at is None else f"step {stopped_at}"
            ) from None
    return stopped_at
