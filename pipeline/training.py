"""The DINO training step and the plain loop around it. No Ray, no files.

Batch (uint8, rows per image) -> to device -> crop-major pixels -> teacher, student -> loss -> optimiser, teacher,
centre. `torch.distributed` is used when a process group exists, else the step is that of a single process.
Axes: B images per process, G global crops, L local crops, V = G + L, K prototypes.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from models import schedules
from models.backbone import BackboneConfig
from models.dino import DINO, TeacherConfig, crop_major
from models.head import HeadConfig
from models.loss import LossConfig, batch_center, cross_entropy, teacher_probs, update_center
from models.optim import (
    OptimConfig,
    build_optimizer,
    clip_per_parameter,
    drop_last_layer_grads,
    scaled_lr,
    set_hyperparameters,
)
from models.settings import Settings
from pipeline.crops import CropsConfig


class TrainConfig(Settings):
    """Length, batch and precision of the run."""

    epochs: float = Field(default=100, gt=0, allow_inf_nan=False)
    """Passes over the images; one epoch shows each image once, whatever the batch size."""
    global_batch_size: int = Field(default=512, ge=1)
    """Images per optimiser step over all train workers together."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast of the networks; auto is bf16 on a GPU and fp32 on a CPU. Head, loss and teacher update stay fp32."""
    seed: int = Field(default=0, ge=0)
    """Seeds weights, order, crops and stochastic depth."""


class DINOConfig(Settings):
    """All that defines the algorithm, and nothing of where it runs."""

    crops: CropsConfig = CropsConfig()
    backbone: BackboneConfig = BackboneConfig()
    head: HeadConfig = HeadConfig()
    loss: LossConfig = LossConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()


@dataclass(frozen=True)
class StepSettings:
    """What the schedules say for one step."""

    lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temp: float
    freeze_last_layer: bool


class Schedule:
    """Every schedule of the run as a function of step. Epochs become steps here and nowhere else."""

    def __init__(self, config: DINOConfig, *, num_images: int) -> None:
        self._config = config
        self._num_images = num_images
        self.total_steps = max(1, math.floor(self._steps(config.train.epochs)))
        self.warmup_steps = schedules.cap_warmup(
            round(self._steps(config.optim.warmup_epochs)), self.total_steps
        )
        self.warmup_temp_epochs = schedules.cap_warmup(
            config.loss.warmup_teacher_temp_epochs, math.ceil(config.train.epochs)
        )
        self.freeze_steps = round(self._steps(config.optim.freeze_last_layer_epochs))

    def epoch(self, step: int) -> int:
        """Epoch that the first image of `step` belongs to."""
        return step * self._config.train.global_batch_size // self._num_images

    def at(self, step: int) -> StepSettings:
        """Settings of the step about to run."""
        c, total = self._config, self.total_steps
        return StepSettings(
            lr=schedules.warmup_cosine(
                step,
                base=scaled_lr(c.optim.base_lr, c.train.global_batch_size),
                final=c.optim.min_lr,
                total_steps=total,
                warmup_steps=self.warmup_steps,
            ),
            weight_decay=schedules.warmup_cosine(
                step, base=c.optim.weight_decay, final=c.optim.final_weight_decay, total_steps=total
            ),
            teacher_momentum=schedules.warmup_cosine(
                step,
                base=c.teacher.teacher_momentum,
                final=c.teacher.final_teacher_momentum,
                total_steps=total,
            ),
            teacher_temp=schedules.teacher_temp(
                self.epoch(step),
                base=c.loss.teacher_temp,
                warmup=c.loss.warmup_teacher_temp,
                warmup_epochs=self.warmup_temp_epochs,
            ),
            freeze_last_layer=step < self.freeze_steps,
        )

    def _steps(self, epochs: float) -> float:
        return epochs * self._num_images / self._config.train.global_batch_size


@dataclass
class TrainState:
    """Everything that a step changes, and what it reads. `student` is `dino.student`, or its DDP wrapper."""

    config: DINOConfig
    schedule: Schedule
    dino: DINO
    optimizer: torch.optim.Optimizer
    device: torch.device
    student: nn.Module = field(init=False)
    step: int = 0

    def __post_init__(self) -> None:
        self.student = self.dino.student


def build_state(config: DINOConfig, *, num_images: int, device: torch.device | str = "cpu") -> TrainState:
    """Seeded networks, optimiser and schedules, at step 0. `num_images` is the length of an epoch."""
    torch.manual_seed(config.train.seed)
    dino = DINO(
        config.backbone,
        config.head,
        crop_sizes=config.crops.crop_sizes,
    ).to(device)
    return TrainState(
        config=config,
        schedule=Schedule(config, num_images=num_images),
        dino=dino,
        optimizer=build_optimizer(config.optim, dino.student),
        device=torch.device(device),
    )


def train_step(state: TrainState, batch: Mapping[str, Any]) -> dict[str, Tensor | float]:
    """One step on this process's share of the global batch; advances `state.step` by one.

    `batch`: uint8 arrays or tensors `global_crops` [B, G, H, W, 3] and `local_crops` [B, L, h, w, 3]; never
    written to. Returns the step's metrics, means over all processes: `loss`, `teacher_entropy`, `kl` (nats),
    `grad_norm` (L2 over all gradients before clipping) as 0-d tensors, and the schedules' values as floats.
    """
    config, dino, now = state.config, state.dino, state.schedule.at(state.step)
    set_hyperparameters(state.optimizer, lr=now.lr, weight_decay=now.weight_decay)
    state.optimizer.zero_grad(set_to_none=True)
    # Stochastic depth is a function of (seed, step, rank): a resumed run draws what the first one would have.
    torch.manual_seed(((config.train.seed * 1_000_003 + state.step) * 65_537 + _rank()) % (1 << 63))
    global_crops = pixels(batch["global_crops"], config.crops, state.device)
    local_crops = pixels(batch["local_crops"], config.crops, state.device)

    with autocast(config.train.precision, state.device):
        teacher_logits = dino.teacher_logits(global_crops)
        student_logits = state.student([global_crops, local_crops] if len(local_crops) else [global_crops])
    probs = teacher_probs(teacher_logits, dino.center, now.teacher_temp)
    loss, entropy = cross_entropy(
        probs,
        student_logits,
        student_temp=config.loss.student_temp,
        num_global_crops=config.crops.num_global_crops,
    )
    loss.backward()
    grad_norm = clip_per_parameter(dino.student, config.optim.clip_grad)
    if now.freeze_last_layer:
        drop_last_layer_grads(dino.student.head)
    rows = len(teacher_logits)
    local_sums = torch.cat([torch.stack([loss.detach(), entropy]) * rows, batch_center(teacher_logits)])
    sums = all_reduce_sum(local_sums)  # one collective: metrics, then the centre's sum and count

    state.optimizer.step()
    dino.update_teacher(now.teacher_momentum)
    dino.center.copy_(update_center(dino.center, sums[2:], momentum=config.loss.center_momentum))
    state.step += 1

    mean_loss, mean_entropy = (sums[:2] / sums[-1]).unbind()
    return {
        "loss": mean_loss,
        "teacher_entropy": mean_entropy,
        "kl": mean_loss - mean_entropy,
        "grad_norm": grad_norm,
        "lr": now.lr,
        "weight_decay": now.weight_decay,
        "teacher_momentum": now.teacher_momentum,
        "teacher_temp": now.teacher_temp,
    }


def train(
    state: TrainState,
    batches: Iterable[Mapping[str, Any]],
    *,
    on_step: Callable[[Mapping[str, Any], dict[str, Tensor | float], float], None],
) -> None:
    """Run a step per batch; after each, call `on_step(batch, metrics, wait_seconds)`.

    `wait_seconds` is how long the step waited for its batch.
    """
    iterator = iter(batches)
    while True:
        asked = time.perf_counter()
        try:
            batch = next(iterator)
        except StopIteration:
            return
        wait_seconds = time.perf_counter() - asked
        on_step(batch, train_step(state, batch), wait_seconds)


def pixels(crops: Any, config: CropsConfig, device: torch.device) -> Tensor:
    """uint8 [B, C, H, W, 3] -> normalised float32 [C*B, 3, H, W] on the device, crop-major; the input is not changed.

    The only place where rows per image become rows per crop. Bytes cross to the device, floats do not.
    """
    x = crop_major(torch.as_tensor(crops).to(device, non_blocking=True)).float()
    mean = torch.tensor(config.pixel_mean, device=device).view(3, 1, 1) * 255
    std = torch.tensor(config.pixel_std, device=device).view(3, 1, 1) * 255
    return (x - mean) / std


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast where `precision` asks for it; auto means on a GPU."""
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over processes; the input itself when there is no process group."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
