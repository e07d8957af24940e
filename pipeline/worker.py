"""What one Ray Train worker does: device, DDP, restore, stream, train, evaluate, report.

The only user of ray.train. `fit` starts the workers from the driver; `work` is what each of them runs.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import ray.exceptions
import ray.train
import ray.train.collective
import ray.train.torch
import torch
from pydantic import Field, PositiveInt, field_validator
from ray.train import Checkpoint, CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig
from ray.train import CheckpointConfig as RayCheckpointConfig
from torch.nn.parallel import DistributedDataParallel

from models.backbone import has_batch_norm
from models.settings import DinorayError, Settings
from pipeline import dataset
from pipeline.board import Board
from pipeline.checkpoint import CheckpointConfig, checkpoint_name, load_checkpoint, save_checkpoint
from pipeline.crops import crop_bytes
from pipeline.features import EvalConfig, Features, embed_sharded, knn_accuracy
from pipeline.layout import Layout, batch_size_per_worker, steps_per_block
from pipeline.metrics import LogConfig, Meter, MetricsLog
from pipeline.quarantine import Quarantine
from pipeline.source import Source
from pipeline.storage import Directory, filesystem
from pipeline.training import DINOConfig, build_state, train


class ResourcesConfig(Settings):
    """Where the run runs. Nothing here changes what is learnt, so all of it may differ when a run is resumed."""

    train_workers: int = Field(default=1, ge=1)
    """DDP processes; the global batch is divided among them."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU per train worker; auto takes GPUs when the cluster has any."""
    cpus_per_train_worker: float = Field(default=1, ge=0)
    """CPUs reserved for each train worker."""
    augment_actors: PositiveInt | tuple[PositiveInt, PositiveInt] | Literal["auto"] = "auto"
    """CPU actors that fetch and crop: a number, a range [least, most] that follows demand, or all CPUs left over."""
    cpus_per_augment_actor: float = Field(default=1, gt=0)
    """CPUs reserved for each augment actor."""
    prefetch_batches: int = Field(default=2, ge=0)
    """Batches that each train worker holds ready."""
    max_failures: int = Field(default=3, ge=-1)
    """Times that lost or failed train workers are started again from the last checkpoint; -1 is no limit."""

    @field_validator("augment_actors")
    @classmethod
    def _range_is_ordered(cls, actors: int | tuple[int, int] | str) -> int | tuple[int, int] | str:
        if isinstance(actors, tuple) and actors[0] > actors[1]:
            raise ValueError(f"{list(actors)} must be [least, most] with least <= most")
        return actors


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker needs to know; sent to each."""

    run: Directory
    board: Board
    config: DINOConfig
    stream: dataset.StreamPlan
    checkpoint: CheckpointConfig
    log: LogConfig
    eval: EvalConfig
    eval_sources: "tuple[ray.ObjectRef[Source], ray.ObjectRef[Source]] | None"
    num_images: int
    max_bad_fraction: float
    prefetch_batches: int


def fit(spec: WorkerSpec, resources: ResourcesConfig, *, use_gpu: bool) -> None:
    """Run the training to its end; a run directory that holds committed checkpoints is continued from the newest."""
    storage, path = filesystem(spec.run.uri)
    ray.train.torch.TorchTrainer(
        work,
        train_loop_config={"spec": spec},
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
    """One train worker, from start to finish. An error that a person must mend ends the run at once."""
    spec: WorkerSpec = loop_config["spec"]
    try:
        _Worker(spec).run()
    except Exception as error:
        known = known_error(error)
        if known is None:
            raise
        spec.board.post_fatal(str(known), known.exit_code)
        raise known from error


class _Worker:
    """One worker's share of the run. Rank 0 also writes: metrics, quarantine, checkpoints."""

    def __init__(self, spec: WorkerSpec) -> None:
        context = ray.train.get_context()
        self.spec = spec
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        device = ray.train.torch.get_device()
        # Batches are read-only views of the object store. Nothing writes to them, so torch need not warn.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.world_size))
        self.state = build_state(spec.config, num_images=spec.num_images, device=device)
        self.quarantine = Quarantine(self._restore())
        self._distribute(device)
        self.log = (
            MetricsLog(
                spec.run,
                first_step=self.state.step,
                first_position=self.state.step * spec.config.train.global_batch_size,
            )
            if self.rank == 0
            else None
        )
        self.meter = Meter()

    def run(self) -> None:
        """Train from the restored step to the last."""
        state, total = self.state, self.state.schedule.total_steps
        if state.step == 0:
            self._evaluate()
        train(state, self._batches(), on_step=self._on_step)
        if state.step != total:
            raise DinorayError(f"training ended at step={state.step} of {total}")
        if self.log:
            self.log.close()

    def _restore(self) -> dict[str, int]:
        """Load the newest committed checkpoint, if any; return the bad images counted so far."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return {}
        with checkpoint.as_directory() as folder:
            meta = load_checkpoint(self.state, Path(folder))
        if self.rank == 0:
            self.spec.board.post("note", text=f"resuming from step {self.state.step}")
        return meta["bad_images"]

    def _distribute(self, device: torch.device) -> None:
        if self.world_size == 1:
            return
        dino = self.state.dino
        if device.type == "cuda" and has_batch_norm(dino.student):
            dino.student = torch.nn.SyncBatchNorm.convert_sync_batchnorm(dino.student)
            dino.teacher = torch.nn.SyncBatchNorm.convert_sync_batchnorm(dino.teacher)
        self.state.student = DistributedDataParallel(
            dino.student, device_ids=[device] if device.type == "cuda" else None
        )

    def _batches(self) -> Iterator[dict[str, Any]]:
        per_worker = batch_size_per_worker(self.spec.config.train.global_batch_size, self.world_size)
        layout = Layout(
            first_step=self.state.step,
            last_step=self.state.schedule.total_steps,
            world_size=self.world_size,
            batch_size_per_worker=per_worker,
            steps_per_block=steps_per_block(per_worker, crop_bytes(self.spec.config.crops)),
        )
        for leg in dataset.legs(layout):
            splits = dataset.open_splits(self.spec.stream, leg) if self.rank == 0 else None
            mine = ray.train.collective.broadcast_from_rank_zero(splits)[self.rank]
            yield from dataset.batches(mine, leg, rank=self.rank, prefetch_batches=self.spec.prefetch_batches)

    def _on_step(self, batch: Any, metrics: dict[str, Any], wait_seconds: float) -> None:
        spec, step, total = self.spec, self.state.step, self.state.schedule.total_steps
        self.meter.add(spec.config.train.global_batch_size, wait_seconds)
        self.quarantine.note(batch)
        ends = step == total
        evaluates = ends or step % spec.eval.every_steps == 0
        saves = ends or step % spec.checkpoint.every_steps == 0
        if ends or evaluates or saves or step % spec.log.every_steps == 0:
            self._log_step({k: float(v) for k, v in metrics.items()})
        if evaluates:
            self._evaluate()
        if saves:
            self._save()

    def _log_step(self, metrics: dict[str, float]) -> None:
        step, per_step = self.state.step, self.spec.config.train.global_batch_size
        if not np.isfinite(metrics["loss"]):  # the same on all ranks: it is the reduced loss
            raise DinorayError(
                f"loss={metrics['loss']} at step={step} is not finite; lower optim.base_lr or optim.clip_grad, "
                "or set train.precision=fp32"
            )
        seen = step * per_step
        bad = self.quarantine.share()
        if self.log:
            self.log.quarantine(bad)
        self.quarantine.check(
            num_seen=seen,
            num_images=self.spec.num_images,
            limit=self.spec.max_bad_fraction,
            file=self.spec.run.join("quarantine.jsonl"),
        )
        if self.log is None:
            return
        metrics |= {"epoch": seen / self.spec.num_images, **self.meter.read()}
        metrics["bad_images"] = self.quarantine.counts.total()
        self.log.log(step, metrics)
        self.spec.board.post("step", step=step, total_steps=self.state.schedule.total_steps, **metrics)

    def _evaluate(self) -> None:
        if self.spec.eval_sources is None:
            return
        backbone = self.state.dino.teacher.backbone
        was_training = backbone.training
        backbone.eval()
        sides: list[Features] = []
        limits = (self.spec.eval.max_train_images, self.spec.eval.max_val_images)
        for reference, limit in zip(self.spec.eval_sources, limits, strict=True):
            sides.append(
                embed_sharded(
                    backbone,
                    ray.get(reference),
                    self.spec.config.crops,
                    self.spec.eval,
                    limit=limit,
                    precision=self.spec.config.train.precision,
                )
            )
        backbone.train(was_training)
        if self.log:
            scores = knn_accuracy(sides[0], sides[1], self.spec.eval)
            self.log.log(self.state.step, scores)
            self.spec.board.post("eval", step=self.state.step, **scores)
        self.meter.restart()

    def _save(self) -> None:
        checkpoint, name = None, checkpoint_name(self.state.step)
        if self.log:
            self.log.sync()  # before the commit: what a checkpoint continues from must already be written
            folder = Path(tempfile.mkdtemp(prefix="dinoray-checkpoint-"))
            try:
                save_checkpoint(
                    self.state,
                    folder,
                    num_images=self.spec.num_images,
                    bad_images=dict(self.quarantine.counts),
                )
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            checkpoint = Checkpoint.from_directory(str(folder))
            self.spec.board.post("checkpoint", step=self.state.step, name=name)
        # Uploads in the background and removes the folder afterwards.
        ray.train.report(
            {"step": self.state.step},
            checkpoint=checkpoint,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        )
        self.meter.restart()


def known_error(error: BaseException | None) -> DinorayError | None:
    """The error of ours that `error` is or was caused by, through Ray's wrapping."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # Ray wraps a task's error in a class derived from it, whose text is the whole traceback.
        if isinstance(error, DinorayError) and not isinstance(error, ray.exceptions.RayError):
            return error
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None
