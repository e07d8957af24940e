"""What rank 0 alone writes and posts: metrics, bad images, evaluations, notes.

Files are written on a thread, so that training continues while the storage does not take them.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray

from dinoray.pipeline.cluster.channel import UNCHECKED_READS
from dinoray.pipeline.cluster.nodes import NodeWatch
from dinoray.pipeline.cluster.pool_mailbox import PoolMailbox
from dinoray.pipeline.evaluation.in_training import Evaluation
from dinoray.pipeline.reporting.run_report import build_report
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import is_s3
from dinoray.pipeline.storage.unsaved import UNSAVED, report_unsaved
from dinoray.pipeline.tracking.prometheus import Gauges
from dinoray.pipeline.tracking.records import read_records, spent
from dinoray.pipeline.tracking.run_log import MetricsLog
from dinoray.pipeline.tracking.scalar_names import BAD_IMAGES_OF
from dinoray.pipeline.tracking.scores import MISSING, Scores, evaluations, missing_evaluations, scores_of
from dinoray.pipeline.tracking.services import open_trackers
from dinoray.pipeline.tracking.start import Regression, gain_of, regression, start_of
from dinoray.pipeline.tracking.write_thread import WriteThread
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.distributed import world_size
from dinoray.pipeline.training.flops import Utilisation
from dinoray.pipeline.training.staging import STAGED_BYTES
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.training.verdict import Verdict
from dinoray.pipeline.worker.spec import WorkerSpec
from dinoray.pipeline.worker.throughput import PoolThroughput, ThroughputMeter

_CHECK_SECONDS = 1.0
"""Least time between two checks before a line is appended."""


class Outputs:
    """The run's outputs; only rank 0 has them."""

    def __init__(self, spec: WorkerSpec, state: TrainState) -> None:
        spec.check_fence()  # before the log drops the lines of steps that are to be repeated
        self._spec, self._channel, self._checked_at = spec, spec.channel, time.monotonic()
        self._images_per_step = spec.config.train.global_batch_size
        report_unsaved(lambda text, _: self._channel.post("note", text=text))
        self._writes = WriteThread()
        trackers = open_trackers(
            spec.track, spec.run, name=spec.name, params=spec.params, page=build_report, tell=self.note
        )
        records = read_records(spec.run)
        self._nodes = NodeWatch(spec.cost, dollars=spent(records))
        # Later steps are repeated.
        lines = [line for line in records.lines if line["step"] <= state.step]
        self._evaluations = evaluations(lines)
        self.start = start_of(lines)
        """The evaluation before the first step, if it had scores: the line to beat."""
        self._grace_steps = state.health.grace_steps
        self.begun_at = lines[0]["step"] if lines else state.step
        """The step at which the run began, or the first one that it has logged."""
        self._missing = missing_evaluations(lines)
        self._gauges = Gauges(spec.name, total_steps=state.schedule.total_steps)
        self._gauges.set_start(self.start or {})
        self._log = MetricsLog(
            spec.run,
            num_images=spec.num_images,
            first_step=state.step,
            resume_position=state.step * self._images_per_step,
            others=[self._gauges, *trackers],
            tell=self.note,
            writes=self._writes,
        )
        self._channel.post("placed", group=ray.util.get_current_placement_group(), num_workers=world_size())
        self._pool = PoolMailbox(spec.channel)
        self._staged: dict[str, int] = {}
        self._utilisation = Utilisation.of_run(state.config, state.device, num_devices=world_size())
        self._meter, self._pool_meter = ThroughputMeter(), PoolThroughput(self._pool.send_reading)
        if state.compilation.note:
            self.note(f"warning: {state.compilation.note}")

    def note(self, text: str) -> None:
        """Post a line for the user; return once it has arrived."""
        self._channel.post_and_wait("note", text=text)

    def count_step(self, batch: Mapping[str, Any], wait_seconds: float) -> None:
        """Add a step to the throughput."""
        self._staged = {name: batch[name] for name in (STAGED_BYTES,) if name in batch}
        for meter in (self._meter, self._pool_meter):
            meter.add(self._images_per_step, wait_seconds, batch["cpu_ms"], batch["busy_ms"])

    def restart_meters(self) -> None:
        """Begin the throughput anew after an evaluation or a checkpoint, whose time is not that of steps."""
        self._meter.restart()
        self._pool_meter.restart()

    def write_bad_images(self, bad: list[dict[str, Any]]) -> None:
        """Add to quarantine.jsonl."""
        self._log.add_bad_images(bad)

    def write_later(self, write: Callable[[], None]) -> None:
        """Call `write`, which must raise nothing, on the thread that writes files."""
        self._writes.put(write)

    def log_step(self, state: TrainState, metrics: Mapping[str, Any], quarantine: Quarantine) -> None:
        """Log and post a step's metrics, with those of data, cluster and cost."""
        self._check_appends()
        epoch = state.step * self._images_per_step / self._spec.num_images
        logged = {**metrics, "epoch": epoch, "time": time.time(), **self._meter.read(), **self._staged}
        if metrics["verdict"] == Verdict.HEALTHY.value and self.regression:
            logged["verdict"] = Verdict.WORSE.value
        if self._utilisation:
            logged |= self._utilisation.at(logged["images_per_second"])
        logged |= {"trained_images": quarantine.trained, "bad_images": quarantine.counts.total()}
        logged |= {f"{BAD_IMAGES_OF}{status}": count for status, count in sorted(quarantine.counts.items())}
        logged |= {"skipped_steps": state.skipped, "unchecked_reads": self._channel.get(UNCHECKED_READS) or 0}
        logged |= {**self._nodes.read(), "train_workers": world_size(), **self._pool.metrics()}
        self._log.log(state.step, logged)
        if ending := state.stage.take_ending():
            self.note(ending)
        facts = {**logged, "unsaved": UNSAVED.unsaved()}
        self._channel.post("step", step=state.step, total_steps=state.schedule.total_steps, **facts)

    def log_evaluation(self, step: int, evaluated: Evaluation) -> None:
        """Log and post scores; add pictures and embeddings."""
        self._spec.check_fence()
        if evaluated.attention is not None:
            self._log.picture(run_dir.ATTENTION, step, evaluated.attention)
        if evaluated.embedding is not None:
            self._log.embedding(step, evaluated.embedding)
        if evaluated.scores:
            self._evaluations.append({"step": step, **evaluated.scores})
            if step == self.begun_at:
                self.start = self._evaluations[-1]
                self._gauges.set_start(self.start)
            gain = gain_of(self.start, self._evaluations[-1]) if self.start else None
            self._log.log(step, evaluated.scores | ({"above_start": gain.difference} if gain else {}))
        # The report is made from the files in the run directory.
        self._log.sync(then=lambda: self._channel.post("eval", step=step, **evaluated.scores))

    def miss_evaluation(self, step: int, why: str) -> None:
        """Log and tell why a step that was to be evaluated has no scores."""
        self._spec.check_fence()
        self._log.log(step, {MISSING: why})
        self._log.sync()
        self.note(f"warning: no evaluation of step {step}: {why}")

    @property
    def evaluated(self) -> set[int]:
        """The steps that an earlier start, or this one, has evaluated, or has told to be missing."""
        return {line["step"] for line in self._evaluations} | self._missing.keys()

    @property
    def regression(self) -> Regression | None:
        """How the newest evaluations are worse than the start; None if they are not."""
        health = self._spec.health
        return regression(
            self.start,
            self._evaluations,
            grace_steps=self._grace_steps,
            persistence=health.regression_persistence,
            from_weights=self._spec.starts_from_weights,
        )

    @property
    def scores(self) -> Scores:
        """The scores of the steps evaluated so far."""
        return scores_of(self._evaluations)

    def sync_log(self) -> Callable[..., None]:
        """Begin to write the log to the run directory; return what waits until it is written, or raises its error.

        That takes the longest time to wait, in seconds; None: no limit.
        """
        self._spec.check_fence()
        self._log.sync()
        written = self._writes.mark()

        def wait(timeout_seconds: float | None = None) -> None:
            written.wait(timeout_seconds)
            self._writes.check()

        return wait

    def close(self, *, failed: bool = False) -> None:
        """Write all that is still in memory."""
        self._spec.check_fence()
        self._log.close(failed=failed)

    def _check_appends(self) -> None:
        """Check the fence, once in a while, where a line is appended at once; to S3 nothing is sent before a sync."""
        now = time.monotonic()
        if not is_s3(self._spec.run.uri) and now - self._checked_at > _CHECK_SECONDS:
            self._spec.check_fence()
            self._checked_at = now
