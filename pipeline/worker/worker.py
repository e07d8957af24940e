"""One Ray Train worker: device, DDP, restore, stream, train, evaluate, report.

The only user of ray.train. `fit` starts the workers from the driver; each worker runs `work`.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig
from ray.train import CheckpointConfig as RayCheckpointConfig

from models.errors import DinorayError
from pipeline.augment.config import crop_bytes
from pipeline.cluster.channel import known_error
from pipeline.cluster.nodes import NodeWatch
from pipeline.cluster.pool_mailbox import PoolMailbox
from pipeline.cluster.resources import ResourcesConfig
from pipeline.data.partition import lay_out
from pipeline.evaluation.in_training import evaluate
from pipeline.reporting.run_report import build_report
from pipeline.storage.files import filesystem
from pipeline.storage.run_dir import checkpoint_name
from pipeline.stream import ray_data, shared_stream
from pipeline.tracking.prometheus import Gauges
from pipeline.tracking.records import spent
from pipeline.tracking.run_log import MetricsLog
from pipeline.tracking.services import open_trackers
from pipeline.tracking.sink import MetricSink
from pipeline.training.bad_images import Quarantine
from pipeline.training.checkpoint import load_checkpoint, own_copy, temporary_checkpoint
from pipeline.training.ddp import distribute
from pipeline.training.distributed import all_reduce_max, set_up_device
from pipeline.training.init_weights import load_initial_weights
from pipeline.training.step import build_state, train
from pipeline.training.verdict import UnhealthyError, Verdict
from pipeline.worker.spec import WorkerSpec
from pipeline.worker.throughput import PoolThroughput, ThroughputMeter


def fit(spec: WorkerSpec, resources: ResourcesConfig, *, use_gpu: bool) -> None:
    """Run the training to its end; resume from the newest committed checkpoint, if the run has one."""
    storage, path = filesystem(spec.run.uri)
    ray.train.torch.TorchTrainer(
        work,
        # By reference: Ray's controller unpickles this dictionary, and would import all modules of the spec.
        train_loop_config={"spec": ray.put(spec)},
        scaling_config=ScalingConfig(
            num_workers=resources.train_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": resources.cpus_per_train_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=storage,
            checkpoint_config=RayCheckpointConfig(num_to_keep=spec.checkpoint.num_to_keep),
            failure_config=FailureConfig(max_failures=resources.max_failures, controller_failure_limit=10),
        ),
    ).fit()


def work(loop_config: dict[str, Any]) -> None:
    """Run one train worker from start to finish. A DinorayError ends the run at once.

    An error that all workers raise is posted only: if it were raised, Ray would restart the workers.
    """
    spec: WorkerSpec = ray.get(loop_config["spec"])
    log = None
    try:
        worker = _Worker(spec)
        log = worker.log
        worker.run()
    except Exception as error:
        # Before the post, which ends the run: the files named in the error message must be complete.
        with contextlib.suppress(Exception):
            if log:
                log.close(failed=True)
        known = known_error(error)
        if known is None:
            raise
        spec.channel.post_fatal(known)
        if not known.raised_by_all_ranks:
            raise known from error


class _Worker:
    """One worker's share of the run. Rank 0 also writes metrics, quarantine and checkpoints."""

    def __init__(self, spec: WorkerSpec) -> None:
        context = ray.train.get_context()
        self.spec = spec
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        device = ray.train.torch.get_device()
        set_up_device(device)
        self.is_new = ray.train.get_checkpoint() is None
        self.state = build_state(
            spec.config,
            num_images=spec.num_images,
            device=device,
            health=spec.health,
            resumed=not self.is_new,
        )
        self.quarantine = Quarantine(self._initialise() if self.is_new else self._restore())
        self.state.student = distribute(self.state.dino, device)
        self.nodes = NodeWatch(spec.cost, dollars=spent(spec.run)) if self.rank == 0 else None
        self.log = (
            MetricsLog(
                spec.run,
                first_step=self.state.step,
                first_position=self.state.step * spec.config.train.global_batch_size,
                others=self._other_sinks(),
            )
            if self.rank == 0
            else None
        )
        if self.log:
            spec.channel.post("placed", group=ray.util.get_current_placement_group())
        self.pool = PoolMailbox(spec.channel)
        self.meter, self.pace = ThroughputMeter(), PoolThroughput(self.pool.send_reading)
        self.verdict = Verdict.HEALTHY
        self.stopped = False

    def _other_sinks(self) -> list[MetricSink]:
        spec = self.spec
        trackers = open_trackers(
            spec.track, spec.run, name=spec.name, params=spec.params, page=build_report, tell=self._note
        )
        return [Gauges(spec.name, total_steps=self.state.schedule.total_steps), *trackers]

    def _note(self, text: str) -> None:
        self.spec.channel.post_and_wait("note", text=text)

    def run(self) -> None:
        """Train from the restored step to the last step."""
        state, total = self.state, self.state.schedule.total_steps
        if self.is_new:
            self._evaluate()
        train(state, self._batches(), on_step=self._on_step)
        if state.step != total and not self.stopped:
            raise DinorayError(f"training ended at step={state.step} of {total}")
        if self.log:
            self.log.close()
            if self.stopped:
                self.spec.channel.post_and_wait("stopped", step=state.step)

    def _initialise(self) -> dict[str, int]:
        """Load the configured initial weights, if any; return empty counts of bad images."""
        spec = self.spec
        if spec.init_weights is not None:
            load_initial_weights(
                self.state, ray.get(spec.init_weights), spec.init.load
            )  # printed before Ray starts
        return {}

    def _restore(self) -> dict[str, int]:
        """Load the newest committed checkpoint; return its counts of bad images."""
        with own_copy(ray.train.get_checkpoint()) as folder:
            meta = load_checkpoint(self.state, folder)
        if self.rank == 0:
            self.spec.channel.post("note", text=f"resuming from step {self.state.step}")
        return meta["bad_images"]

    def _batches(self) -> Iterator[dict[str, Any]]:
        layout = lay_out(
            range(self.state.step, self.state.schedule.total_steps),
            world_size=self.world_size,
            global_batch_size=self.spec.config.train.global_batch_size,
            image_bytes=crop_bytes(self.spec.config.crops),
        )
        shared, ahead = self.spec.shared, self.spec.prefetch_batches
        if shared:
            yield from shared_stream.batches(shared, layout, rank=self.rank, prefetch_batches=ahead)
        for leg in [] if shared else ray_data.legs(layout):
            splits = ray_data.open_splits(self.spec.stream, leg) if self.rank == 0 else None
            mine = ray.train.collective.broadcast_from_rank_zero(splits)[self.rank]
            yield from ray_data.batches(mine, leg, rank=self.rank, prefetch_batches=ahead)

    def _on_step(self, batch: Any, metrics: dict[str, Any], wait_seconds: float) -> bool:
        spec, state = self.spec, self.state
        step, ends = state.step, state.step == state.schedule.total_steps
        num_images = spec.config.train.global_batch_size
        for meter in (self.meter, self.pace) if self.log else ():
            meter.add(num_images, wait_seconds, batch["cpu_ms"], batch["busy_ms"])
        self.quarantine.note(batch)
        gives_up = state.skipped_in_a_row >= spec.health.max_skipped
        evaluates = ends or step % spec.eval.every_steps == 0
        saves = ends or step % spec.checkpoint.every_steps == 0
        logs = ends or evaluates or saves or gives_up or step % spec.log.every_steps == 0
        if logs:
            self._log_step({k: float(v) for k, v in metrics.items()})
        if gives_up:
            self._go_back()
        if evaluates:
            self._evaluate()
        self.stopped = (
            logs and not ends and self._should_stop(step if evaluates and spec.waits_for_decision else None)
        )
        # A checkpoint must be a good state to go back to: while steps are skipped, only the last one is
        # saved.
        if (saves or self.stopped) and (ends or not state.skipped_in_a_row):
            self._save()
        return self.stopped

    def _should_stop(self, step: int | None) -> bool:
        """Return True on all ranks if the run must end now; await the decision on `step` unless None."""
        told = bool(self.log) and not self.spec.channel.should_continue(step)
        return bool(all_reduce_max(torch.tensor(float(told), device=self.state.device)))

    def _log_step(self, metrics: dict[str, Any]) -> None:
        state, per_step = self.state, self.spec.config.train.global_batch_size
        seen = state.step * per_step
        bad = self.quarantine.share()
        if self.log:
            self.log.quarantine(bad)
        self.quarantine.check(
            num_seen=seen,
            num_images=self.spec.num_images,
            limit=self.spec.max_bad_fraction,
            file=self.spec.run.join("quarantine.jsonl"),
        )
        metrics |= state.health.read(state.step, state.dino.center, skipped_in_a_row=state.skipped_in_a_row)
        if self.log and self.nodes:
            metrics |= {"epoch": seen / self.spec.num_images, "time": time.time(), **self.meter.read()}
            metrics |= {"bad_images": self.quarantine.counts.total(), "skipped_steps": state.skipped}
            metrics |= {**self.nodes.read(), **self.pool.metrics()}
            self.log.log(state.step, metrics)
            self.spec.channel.post("step", step=state.step, total_steps=state.schedule.total_steps, **metrics)
        self._heed(Verdict(metrics["verdict"]))

    def _heed(self, verdict: Verdict) -> None:
        """Post a changed verdict; raise it on a collapse if configured. All ranks do the same."""
        changed, self.verdict = verdict is not self.verdict, verdict
        if verdict is Verdict.HEALTHY or not changed:
            return
        message = f"{verdict.value} at step {self.state.step}: {verdict.remedy}"
        if verdict is not Verdict.NON_FINITE and self.spec.health.on_collapse == "stop":
            raise UnhealthyError(f"{message}; health.on_collapse=warn would go on", verdict)
        if self.log:
            self.spec.channel.post("note", text=f"warning: {message}")

    def _go_back(self) -> None:
        """Raise, so that Ray restarts all workers from the last checkpoint; the second time, end the run."""
        number = self.spec.channel.claim("go back") if self.rank == 0 else None
        number = ray.train.collective.broadcast_from_rank_zero(number)
        steps = f"{self.state.skipped_in_a_row} steps in a row, up to step {self.state.step}, were not finite"
        if number > 1 or not self.spec.can_restart:
            raise UnhealthyError(f"{steps}: {Verdict.NON_FINITE.remedy}", Verdict.NON_FINITE)
        if self.log:
            text = f"warning: {steps}; going back to the last checkpoint"
            self.spec.channel.post_and_wait("note", text=text)
        raise _GoingBackError(steps)

    def _evaluate(self) -> None:
        spec, step = self.spec, self.state.step
        found = evaluate(
            self.state.dino.teacher.backbone,
            (ray.get(spec.eval_sources[0]), ray.get(spec.eval_sources[1])) if spec.eval_sources else None,
            ray.get(spec.stream.source),
            ray.get(spec.pictures),
            title=f"step {step}",
            algorithm=self.state.config,
            config=spec.eval,
            probe=spec.probe,
        )
        if self.log and found:
            if found.attention is not None:
                self.log.picture("attention", step, found.attention)
            if found.embedding is not None:
                self.log.embedding(step, found.embedding)
            if found.scores:
                self.log.log(step, found.scores)
            self.log.sync()  # the report is made from the files in the run directory
            spec.channel.post("eval", step=step, **found.scores)
        self.meter.restart()
        self.pace.restart()

    def _save(self) -> None:
        checkpoint, name = None, checkpoint_name(self.state.step)
        if self.log:
            self.log.sync()  # before the commit: a checkpoint's metrics must be written before it
            bad_images = dict(self.quarantine.counts)
            folder = temporary_checkpoint(self.state, num_images=self.spec.num_images, bad_images=bad_images)
            checkpoint = Checkpoint.from_directory(str(folder))
            self.spec.channel.post("checkpoint", step=self.state.step, name=name)
        # Uploads in the background and removes the folder afterwards.
        ray.train.report(
            {"step": self.state.step},
            checkpoint=checkpoint,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        )
        self.meter.restart()
        self.pace.restart()


class _GoingBackError(RuntimeError):
    """Ends a worker so that Ray restarts it; it needs no action by the user."""
