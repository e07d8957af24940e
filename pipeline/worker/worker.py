"""One Ray Train worker: device, DDP, restore, stream, train, evaluate, report.

The only user of ray.train. `fit` starts the workers from the driver; each worker runs `work`.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from math import ceil
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
from ray.train import CheckpointConfig as RayCheckpointConfig
from ray.train import FailureConfig, RunConfig, ScalingConfig

from dinoray.models.errors import DinorayError
from dinoray.pipeline.augment.config import crop_bytes
from dinoray.pipeline.cluster.channel import known_error
from dinoray.pipeline.cluster.lost_ray import post_loss
from dinoray.pipeline.cluster.pool_mailbox import PoolMailbox
from dinoray.pipeline.cluster.resources import ResourcesConfig
from dinoray.pipeline.data.partition import Layout, lay_out
from dinoray.pipeline.evaluation.in_training import evaluate
from dinoray.pipeline.ray_private.train_controller import controller_callbacks
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import filesystem
from dinoray.pipeline.storage.waiting import report_outages
from dinoray.pipeline.stream import ray_data, shared_stream
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.ddp import distribute
from dinoray.pipeline.training.distributed import all_reduce_max, set_up_device
from dinoray.pipeline.training.init_weights import load_initial_weights
from dinoray.pipeline.training.step import build_state, train
from dinoray.pipeline.training.verdict import UnhealthyError, Verdict
from dinoray.pipeline.worker.agreement import Agreement, StreamFailedError
from dinoray.pipeline.worker.cadence import Cadence
from dinoray.pipeline.worker.outputs import Outputs
from dinoray.pipeline.worker.restoring import RefusedCheckpointError, post_refusal, restore, take_refusal
from dinoray.pipeline.worker.saving import Saver
from dinoray.pipeline.worker.spec import WorkerSpec
from dinoray.pipeline.worker.throughput import WorkMeter

CONTROLLER = "train controller"
"""Name under which the run's channel keeps the handle of Ray Train's controller."""


def fit(spec: WorkerSpec, resources: ResourcesConfig, *, use_gpu: bool) -> None:
    """Run the training to its end; resume from the newest whole checkpoint that is committed, if the run has one."""
    _fit_once(spec, resources, use_gpu=use_gpu)
    while (refusal := take_refusal(spec)) is not None:
        spec.channel.post("note", text=f"warning: {refusal}")
        _fit_once(spec, resources, use_gpu=use_gpu)


def _fit_once(spec: WorkerSpec, resources: ResourcesConfig, *, use_gpu: bool) -> None:
    guard = None if spec.fence is None else partial(spec.fence.check, is_strict=True)
    storage, path = filesystem(spec.run.uri, give_up_after_seconds=spec.give_up_after_seconds, guard=guard)
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
            name=run_dir.CHECKPOINTS,
            storage_path=path,
            storage_filesystem=storage,
            checkpoint_config=RayCheckpointConfig(num_to_keep=spec.checkpoint.num_to_keep),
            failure_config=FailureConfig(
                max_failures=resources.max_failures,
                # Each start of the workers that finds no room within a minute counts, too.
                controller_failure_limit=10 + ceil(resources.wait_for_nodes_minutes),
            ),
            callbacks=controller_callbacks(
                started=partial(spec.channel.put, CONTROLLER), lost=partial(post_loss, spec.channel)
            ),
        ),
    ).fit()


def work(loop_config: dict[str, Any]) -> None:
    """Run one train worker from start to finish. A DinorayError ends the run at once.

    An error that all workers raise is posted only: if it were raised, Ray would restart the workers.
    """
    spec: WorkerSpec = ray.get(loop_config["spec"])
    report_outages(spec.channel.note_outage)
    if spec.channel.posted_error() is not None:
        return  # the run has ended with it: a worker that Ray restarts has nothing to do
    outputs = None
    try:
        worker = _Worker(spec)
        outputs = worker.outputs
        worker.run()
    except RefusedCheckpointError as refused:  # the driver starts the workers again
        if ray.train.get_context().get_world_rank() == 0:
            post_refusal(spec.channel, refused.refusal)
    except Exception as error:
        # Before the post, which ends the run: the files named in the error message must be complete.
        with contextlib.suppress(Exception):
            if outputs:
                outputs.close(failed=True)
        known = known_error(error)
        if known is None:
            raise
        spec.channel.post_fatal(known)
        if not known.raised_by_all_ranks:
            raise known from error


class _Worker:
    """One worker's share of the run: restore, train, evaluate, save."""

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
        self.quarantine = self._initialise() if self.is_new else self._restore()
        self.state.student = distribute(self.state.dino, device)
        self.agreement = Agreement(patience_seconds=spec.give_up_after_seconds, known=known_error)
        self.cadence = Cadence(
            self.state.schedule.total_steps,
            log_every=spec.log.every_steps,
            eval_every=spec.eval.every_steps,
            checkpoint_every=spec.checkpoint.every_steps,
        )
        self.outputs = Outputs(spec, self.state) if self.rank == 0 else None
        # The first rank of each stream speaks for its ranks: rank j for stream j.
        self.work = WorkMeter(partial(PoolMailbox(spec.channel).send_work, self.rank))
        self.saver = Saver(self.state, self.quarantine, spec, self.outputs, self.agreement)
        self.verdict = Verdict.HEALTHY
        self.stopped = False

    def run(self) -> None:
        """Train from the restored step to the last step."""
        state, total = self.state, self.state.schedule.total_steps
        if self.is_new:
            self._evaluate()
        try:
            train(state, self._batches(), on_step=self._on_step)
        except StreamFailedError as failed:
            # Of an augment actor's error Ray forwards only the text; the actor has posted the error itself.
            error = self.spec.channel.posted_error() or failed.error
            # After another error Ray restarts the workers, and does not wait for a checkpoint.
            if (
                isinstance(error, DinorayError)
                and state.step > self.saver.saved_step
                and not state.skipped_in_a_row
            ):
                self.saver.save_last_step(self._count_images)
            raise error from failed
        if state.step != total and not self.stopped:
            raise DinorayError(f"training ended at step={state.step} of {total}")
        if self.outputs:
            self.saver.wait()
            self.outputs.close()
            if self.stopped:
                self.spec.channel.post_and_wait("stopped", step=state.step)

    def _initialise(self) -> Quarantine:
        """Load the configured initial weights, if any; return empty counts of images."""
        spec = self.spec
        if spec.init_weights is not None:
            # Its lines are printed before Ray starts.
            load_initial_weights(self.state, ray.get(spec.init_weights), spec.init.load)
        return Quarantine(first=self._num_seen)

    def _restore(self) -> Quarantine:
        """Load the newest committed checkpoint; return its counts of images. Raises as `restore`."""
        meta = restore(self.state, self.spec.run, ray.train.get_checkpoint())
        if self.rank == 0:
            self.spec.channel.post("resumed", step=self.state.step)
        return Quarantine.restored(meta)

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Yield batches for as long as all workers have one. Raises StreamFailedError."""
        layout = lay_out(
            range(self.state.step, self.state.schedule.total_steps),
            world_size=self.world_size,
            global_batch_size=self.spec.config.train.global_batch_size,
            image_bytes=crop_bytes(self.spec.config.crops),
        )
        shared, ahead = self.spec.shared, self.spec.prefetch_batches
        if shared:
            stream = shared_stream.batches(shared, layout, rank=self.rank, prefetch_batches=ahead)
            yield from self.agreement.batches(stream)
            return
        for leg in ray_data.legs(layout, self.spec.stream.num_streams):
            yield from self.agreement.batches(self._batches_of(leg))

    def _batches_of(self, leg: Layout) -> Iterator[dict[str, Any]]:
        splits, failure = None, None
        if self.rank == 0:
            try:
                splits = ray_data.open_splits(self.spec.stream, leg)
            except Exception as error:
                failure = error  # raised once the others, who wait for the splits, know that there are none
        splits = ray.train.collective.broadcast_from_rank_zero(splits)
        if splits is None:
            raise failure or RuntimeError("train worker 0 could not open the stream")
        ahead = self.spec.prefetch_batches
        yield from ray_data.batches(splits[self.rank], leg, rank=self.rank, prefetch_batches=ahead)

    def _on_step(self, batch: Any, metrics: dict[str, Any], wait_seconds: float) -> bool:
        """Do what is due after a step; return True if the run must end here. All ranks call it alike."""
        state, step = self.state, self.state.step
        if self.outputs:
            self.outputs.count_step(batch, wait_seconds)
        if self.rank < self.spec.stream.num_streams > 1:
            self.work.add(batch["cpu_ms"])
        self.quarantine.note(batch)
        fails = state.skipped_in_a_row >= self.spec.health.max_skipped
        due = self.cadence.due(step, fails=fails)
        if due.logs:
            self._log_step({k: float(v) for k, v in metrics.items()})
        if fails:
            self._go_back()
        if due.evaluates:
            self._evaluate()
        if due.logs and not due.ends:
            self.stopped = self._should_stop(step if due.evaluates and self.spec.waits_for_decision else None)
        # A checkpoint must be a good state to go back to: while steps are skipped, only the last one is
        # saved.
        if (due.saves or self.stopped) and (due.ends or not state.skipped_in_a_row):
            self.saver.save(is_last=due.ends, waits_for_storage=due.ends or self.stopped)
        self.saver.check()
        return self.stopped

    def _should_stop(self, step: int | None) -> bool:
        """Return True on all ranks if the run must end now; await the decision on `step` unless None."""
        told = self.rank == 0 and not self.spec.channel.should_continue(step)
        return bool(all_reduce_max(torch.tensor(float(told), device=self.state.device)))

    def _log_step(self, metrics: dict[str, Any]) -> None:
        state = self.state
        self._count_images()
        self.quarantine.check(
            num_seen=self._num_seen,
            num_images=self.spec.num_images,
            limit=self.spec.max_bad_fraction,
            file=self.spec.run.join(run_dir.QUARANTINE),
        )
        metrics |= state.health.read(state.step, state.dino.center, skipped_in_a_row=state.skipped_in_a_row)
        if self.outputs:
            self.outputs.log_step(state, metrics, self.quarantine)
        self._act_on(Verdict(metrics["verdict"]))

    @property
    def _num_seen(self) -> int:
        return self.state.step * self.spec.config.train.global_batch_size

    def _count_images(self) -> None:
        bad = self.quarantine.share(positions=self._num_seen)
        if self.outputs:
            self.outputs.write_bad_images(bad)

    def _act_on(self, verdict: Verdict) -> None:
        """Post a changed verdict; raise it on a collapse if configured. All ranks do the same."""
        changed, self.verdict = verdict is not self.verdict, verdict
        if verdict is Verdict.HEALTHY or not changed:
            return
        message = f"{verdict.value} at step {self.state.step}: {verdict.remedy}"
        if verdict is not Verdict.NON_FINITE and self.spec.health.on_collapse == "stop":
            raise UnhealthyError(f"{message}; to continue anyway, set health.on_collapse=warn", verdict)
        if self.outputs:
            self.outputs.note(f"warning: {message}")

    def _go_back(self) -> None:
        """Raise, so that Ray restarts all workers from the last checkpoint; the second time, end the run."""
        number = self.spec.channel.claim("go back") if self.rank == 0 else None
        number = ray.train.collective.broadcast_from_rank_zero(number)
        steps = f"{self.state.skipped_in_a_row} steps in a row, up to step {self.state.step}, were not finite"
        if number > 1 or not self.spec.can_restart:
            raise UnhealthyError(f"{steps}: {Verdict.NON_FINITE.remedy}", Verdict.NON_FINITE)
        if self.outputs:
            self.outputs.note(f"warning: {steps}; going back to the last checkpoint")
        raise _GoingBackError(steps)

    def _evaluate(self) -> None:
        spec, step = self.spec, self.state.step
        evaluation = evaluate(
            self.state.dino.teacher.backbone,
            (ray.get(spec.eval_sources[0]), ray.get(spec.eval_sources[1])) if spec.eval_sources else None,
            ray.get(spec.stream.source),
            ray.get(spec.pictures),
            title=f"step {step}",
            algorithm=self.state.config,
            config=spec.eval,
            probe=spec.probe,
        )
        if self.outputs:
            if evaluation:
                self.outputs.log_evaluation(step, evaluation)
            self.outputs.restart_meters()


class _GoingBackError(RuntimeError):
    """Ends a worker so that Ray restarts it; it needs no action by the user."""
