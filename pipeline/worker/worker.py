"""One Ray Train worker: device, DDP, restore, stream, train, evaluate, report.

`fit` in fit.py starts the workers from the driver; each worker runs `work`.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch

from dinoray.models.errors import DinorayError
from dinoray.pipeline.augment.config import crop_bytes
from dinoray.pipeline.cluster.channel import known_error
from dinoray.pipeline.cluster.pool_mailbox import PoolMailbox
from dinoray.pipeline.data.partition import Layout, lay_out
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.waiting import report_outages
from dinoray.pipeline.stream import ray_data, shared_stream
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.ddp import distribute
from dinoray.pipeline.training.distributed import all_reduce_max, set_up_device
from dinoray.pipeline.training.init_weights import load_initial_weights
from dinoray.pipeline.training.skips import Skip
from dinoray.pipeline.training.staging import staged
from dinoray.pipeline.training.state import build_state
from dinoray.pipeline.training.step import train
from dinoray.pipeline.training.verdict import UnhealthyError, Verdict
from dinoray.pipeline.worker.agreement import Agreement, StreamFailedError
from dinoray.pipeline.worker.cadence import Cadence
from dinoray.pipeline.worker.capture import Capture
from dinoray.pipeline.worker.ending import Ending
from dinoray.pipeline.worker.evaluations import Evaluations
from dinoray.pipeline.worker.outputs import Outputs
from dinoray.pipeline.worker.regression_guard import RegressionGuard
from dinoray.pipeline.worker.restoring import RefusedCheckpointError, post_refusal, restore
from dinoray.pipeline.worker.saving import Saver
from dinoray.pipeline.worker.signs import Signs
from dinoray.pipeline.worker.spec import WorkerSpec
from dinoray.pipeline.worker.throughput import WorkMeter


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
                worker.evaluations.tell_left()
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
        self.signs = Signs(spec.channel, self.rank)
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
        self.state.compile()
        self.state.student = distribute(self.state.dino, device)
        self.agreement = Agreement(patience_seconds=spec.give_up_after_seconds, known=known_error)
        self.cadence = Cadence.of(
            self.state.schedule.total_steps,
            log=spec.log,
            evaluation=spec.eval,
            checkpoint=spec.checkpoint,
            is_scored=spec.has_scores,
        )
        self.outputs = Outputs(spec, self.state) if self.rank == 0 else None
        # The first rank of each stream speaks for its ranks: rank j for stream j.
        self.work = WorkMeter(partial(PoolMailbox(spec.channel).send_work, self.rank))
        self.ending = Ending(spec.channel) if self.rank == 0 else None
        self.evaluations = Evaluations(
            self.state, spec, self.outputs, self.agreement, num_ranks=self.world_size, ending=self.ending
        )
        self.saver = Saver(
            self.state,
            self.quarantine,
            spec,
            self.outputs,
            self.agreement,
            under_way=lambda: self.evaluations.under_way,
        )
        self.capture = Capture.of(
            spec,
            self.state,
            write=self.outputs.write_later if self.outputs else None,
            source=lambda: ray.get(spec.stream.source),
            last_checkpoint=lambda: self.saver.saved_step,
        )
        self.guard = RegressionGuard(spec.health, self.outputs)
        self.verdict, self.stopped = Verdict.HEALTHY, False

    def run(self) -> None:
        """Train from the restored step to the last step."""
        state, total = self.state, self.state.schedule.total_steps
        self.signs.does(state.step, "evaluates")
        if self.is_new:
            self.evaluations.evaluate_start()
        else:
            self.evaluations.resume()
        self.signs.does(state.step, "waits for images")
        try:
            with self.capture.of_errors():
                train(state, self.capture.watch(self._batches()), on_step=self._on_step)
        except StreamFailedError as failed:
            # Of an augment actor's error Ray forwards only the text; the actor has posted the error itself.
            error = self.spec.channel.posted_error() or failed.error
            state.skips.settle()
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
        if self.stopped:
            self.evaluations.tell_left()
        else:
            self.signs.does(state.step, "evaluates")
            self.evaluations.wait(self.saver.check)
            if self.evaluations.are_beside:
                self.saver.finish()
        self.signs.does(state.step, "saves")
        if self.outputs:
            self.saver.wait()
            self.outputs.close()
        if self.ending and self.stopped:
            self.ending.post(state.step)

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

    def _batches(self) -> Iterator[Mapping[str, Any]]:
        """Yield batches for as long as all workers have one. Raises StreamFailedError."""
        layout = lay_out(
            range(self.state.step, self.state.schedule.total_steps),
            world_size=self.world_size,
            global_batch_size=self.spec.config.train.global_batch_size,
            image_bytes=crop_bytes(self.spec.config.crops),
            block_bytes=self.spec.stream.block_bytes,
        )
        shared, ahead = self.spec.shared, self.spec.prefetch_batches
        if shared:
            stream = shared_stream.batches(shared, layout, rank=self.rank, prefetch_batches=ahead)
            yield from self._agreed(staged(stream, self.state.device))
            return
        for leg in ray_data.legs(layout, self.spec.stream.num_streams):
            yield from self._agreed(self._batches_of(leg))

    def _agreed(self, stream: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        for batch in self.agreement.batches(stream, self.ending.is_asked if self.ending else lambda: False):
            self.signs.does(self.state.step, "starts" if self.state.is_compiling else "trains")
            yield batch

    def _batches_of(self, leg: Layout) -> Iterator[Mapping[str, Any]]:
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
        stream = ray_data.batches(splits[self.rank], leg, rank=self.rank, prefetch_batches=ahead)
        yield from staged(stream, self.state.device)

    def _on_step(self, batch: Any, metrics: dict[str, Any], wait_seconds: float) -> bool:
        """Do what is due after a step; return True if the run must end here. All ranks call it alike."""
        state, step = self.state, self.state.step
        if self.cadence.due(step, fails=self.agreement.ends).logs:
            state.skips.settle()  # the host reads the step's metrics anyway
        skips = state.skips.take()
        self.capture.after_step(metrics, skips)
        if self.outputs:
            self.outputs.count_step(batch, wait_seconds)
        if self.rank < self.spec.stream.num_streams > 1:
            self.work.add(batch["cpu_ms"])
        self.quarantine.note(batch)
        failing = next((skip for skip in skips if skip.in_a_row >= self.spec.health.max_skipped), None)
        due = self.cadence.due(step, fails=failing is not None or self.agreement.ends)
        if due.logs:
            in_a_row = failing.in_a_row if failing else state.skipped_in_a_row
            self._log_step({k: float(v) for k, v in metrics.items()}, in_a_row)
        if failing:
            self._go_back(failing)
        self.evaluations.look()
        if self.agreement.ends and not due.ends:
            # Before an evaluation, which may take longer than a node that is taken back is left to the run.
            self._save(is_last=False, waits_for_storage=True)
        if due.evaluates:
            self._evaluate()
        self.guard.look(due)
        saves = due.saves
        if due.logs and not due.ends:
            is_decided = due.evaluates and self.spec.waits_for_decision
            goes_on, by_clock = self._decisions(step if is_decided else None)
            saves |= by_clock
            self.stopped = self.agreement.ends or not goes_on
        if saves or self.stopped:
            self._save(is_last=due.ends, waits_for_storage=due.ends or self.stopped)
        self.saver.check()
        self.signs.does(step, "waits for images")
        return self.stopped

    def _save(self, *, is_last: bool, waits_for_storage: bool) -> None:
        """Save this step, unless that is done. A checkpoint must be a good state to go back to: while steps are
        skipped, only the last one is saved."""
        if self.saver.saved_step < self.state.step and (is_last or not self.state.skipped_in_a_row):
            self.signs.does(self.state.step, "saves")
            self.saver.save(is_last=is_last, waits_for_storage=waits_for_storage)

    def _decisions(self, step: int | None) -> tuple[bool, bool]:
        """Return on all ranks whether the run goes on, and whether a save is due by time, as rank 0 decides.

        `step`: await the decision on it unless None.
        """
        if step is None and self.spec.checkpoint.every_minutes is None:
            return True, False
        mine = (False, False)
        if self.rank == 0:
            mine = (step is not None and not self.spec.channel.decision(step), self.saver.is_due())
        answers = torch.tensor(mine, dtype=torch.float32, device=self.state.device)
        ends, saves = all_reduce_max(answers).tolist()
        return not ends, bool(saves)

    def _log_step(self, metrics: dict[str, Any], skipped_in_a_row: int) -> None:
        state = self.state
        self._count_images()
        self.quarantine.check(
            num_seen=self._num_seen,
            num_images=self.spec.num_images,
            most_passes=self.spec.stream.order.most_passes,
            limit=self.spec.max_bad_fraction,
            file=self.spec.run.join(run_dir.QUARANTINE),
        )
        metrics |= state.health.read(state.step, state.dino.center, skipped_in_a_row=skipped_in_a_row)
        if self.outputs:
            metrics |= self.evaluations.metrics()
            self.outputs.log_step(state, metrics, self.quarantine)
        self._act_on(Verdict(metrics["verdict"]), metrics)

    @property
    def _num_seen(self) -> int:
        return self.state.step * self.spec.config.train.global_batch_size

    def _count_images(self) -> None:
        bad = self.quarantine.share(positions=self._num_seen)
        if self.outputs:
            self.outputs.write_bad_images(bad)

    def _act_on(self, verdict: Verdict, metrics: Mapping[str, Any]) -> None:
        """Post a changed verdict; raise it on a collapse if configured. All ranks do the same."""
        changed, self.verdict = verdict is not self.verdict, verdict
        if verdict is Verdict.HEALTHY or not changed:
            return
        if verdict is not Verdict.NON_FINITE:
            self.capture.collapse(verdict.value, metrics)
        message = f"{verdict.value} at step {self.state.step}: {verdict.remedy}"
        if verdict is not Verdict.NON_FINITE and self.spec.health.on_collapse == "stop":
            raise UnhealthyError(f"{message}; to continue anyway, set health.on_collapse=warn", verdict)
        if self.outputs:
            self.outputs.note(f"warning: {message}")

    def _go_back(self, failing: Skip) -> None:
        """Raise, so that Ray restarts all workers from the last checkpoint; the second time, end the run."""
        number = self.spec.channel.claim("go back") if self.rank == 0 else None
        number = ray.train.collective.broadcast_from_rank_zero(number)
        steps = f"{failing.in_a_row} steps in a row, up to step {failing.step}, were not finite"
        if number > 1 or not self.spec.can_restart:
            raise UnhealthyError(f"{steps}: {Verdict.NON_FINITE.remedy}", Verdict.NON_FINITE)
        if self.outputs:
            self.outputs.note(f"warning: {steps}; going back to the last checkpoint")
        raise _GoingBackError(steps)

    def _evaluate(self) -> None:
        self.signs.does(self.state.step, "evaluates")
        self.evaluations.evaluate()


class _GoingBackError(RuntimeError):
    """Ends a worker so that Ray restarts it; it needs no action by the user."""
