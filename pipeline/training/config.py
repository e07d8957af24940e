"""The config of the DINO algorithm, and all its schedules as functions of step. No Ray, no files.

Each section is defined beside the part that it configures. The schedules need the length of an epoch: it
converts epochs to steps and `auto` to numbers.
"""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, PositiveFloat, field_validator

from dinoray.models import schedules
from dinoray.models.config import (
    BackboneConfig,
    Checkpointing,
    Compile,
    HeadConfig,
    LossConfig,
    OptimConfig,
    TeacherConfig,
)
from dinoray.models.schedules import scaled_lr
from dinoray.models.settings import Settings, number
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.data.config import PixelsConfig
from dinoray.pipeline.storage.addresses import normal_uri

_DAY_SECONDS = 86_400


class TrainConfig(Settings):
    """Length, batch and precision of the run."""

    epochs: float = Field(default=100, gt=0, allow_inf_nan=False)
    """Passes over the images."""
    global_batch_size: int = Field(default=512, ge=1)
    """Images per optimiser step, over all train workers."""
    accumulate_steps: int = Field(default=1, ge=1)
    """Microbatches per step, to fit memory; Sinkhorn, KoLeo and batch norm see one microbatch at a time."""
    max_batch_size_per_worker: int | None = Field(default=None, ge=1)
    """Most images of a microbatch: fewer workers, each with a larger share, divide it further; None: no limit."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Schedule of learning rate, weight decay and teacher momentum: cosine to the end, or constant after warm-up."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast of the networks; auto is bf16 on a GPU and fp32 on a CPU. Head, loss and teacher update stay fp32."""
    activation_checkpointing: Checkpointing = "none"
    """Compute activations again in the backward pass, to fit memory: none, those of every second block, or of all."""
    compile: Compile = "auto"
    """Compile the blocks of student and teacher with torch.compile; auto: on a GPU, unless a compiler is missing."""
    seed: int = Field(default=0, ge=0)
    """Seed of weights, image order, crops and stochastic depth."""


class DINOConfig(Settings):
    """All settings that define what is learnt."""

    data: PixelsConfig = PixelsConfig(value_range=None)  # as before there was a choice
    crops: CropsConfig = CropsConfig()
    backbone: BackboneConfig = BackboneConfig()
    head: HeadConfig = HeadConfig()
    loss: LossConfig = LossConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()


@dataclass(frozen=True)
class StepSettings:
    """Values of the schedules at one step."""

    lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temp: float
    freeze_last_layer: bool


class Schedule:
    """All schedules of the run as functions of step. Only this class converts epochs to steps."""

    def __init__(self, config: DINOConfig, *, num_images: int) -> None:
        self._config = config
        self._num_images = num_images
        self.total_steps = max(1, math.floor(self.steps(config.train.epochs)))
        self.warmup_steps = schedules.cap_warmup(
            round(self.steps(config.optim.warmup_epochs)), self.total_steps
        )
        self.warmup_temp_epochs = schedules.cap_warmup(
            config.loss.warmup_teacher_temp_epochs, math.ceil(config.train.epochs)
        )
        self.freeze_steps = round(self.steps(config.optim.freeze_last_layer_epochs))

    def epoch(self, step: int) -> int:
        """Return the epoch of the first image of `step`."""
        return step * self._config.train.global_batch_size // self._num_images

    def steps(self, epochs: float) -> float:
        """Return the number of steps in `epochs`, not rounded."""
        return epochs * self._num_images / self._config.train.global_batch_size

    def settled_step(self) -> int:
        """Return the first step after the warm-ups of both the learning rate and the teacher temperature."""
        return max(self.warmup_steps, math.ceil(self.steps(self.warmup_temp_epochs)))

    def at(self, step: int) -> StepSettings:
        """Return the settings of `step`, the step about to run."""
        c = self._config
        return StepSettings(
            lr=self._course(
                step,
                scaled_lr(c.optim.base_lr, c.train.global_batch_size),
                c.optim.min_lr,
                warmup_steps=self.warmup_steps,
            ),
            weight_decay=self._course(step, c.optim.weight_decay, c.optim.final_weight_decay),
            teacher_momentum=self._course(
                step, number(c.teacher.teacher_momentum), c.teacher.final_teacher_momentum
            ),
            teacher_temp=schedules.teacher_temp(
                self.epoch(step),
                base=number(c.loss.teacher_temp),
                warmup=c.loss.warmup_teacher_temp,
                warmup_epochs=self.warmup_temp_epochs,
            ),
            freeze_last_layer=step < self.freeze_steps,
        )

    def _course(self, step: int, base: float, final: float, *, warmup_steps: int = 0) -> float:
        if self._config.train.schedule == "constant":
            return schedules.warmup_constant(step, base=base, warmup_steps=warmup_steps)
        return schedules.warmup_cosine(
            step, base=base, final=final, total_steps=self.total_steps, warmup_steps=warmup_steps
        )


class CheckpointConfig(Settings):
    """Checkpoints: how often they are written and which are kept."""

    every_steps: int = Field(default=500, ge=1)
    """Steps between checkpoints, unless every_minutes is set; a killed run repeats at most these and a few seconds."""
    every_minutes: PositiveFloat | Literal["auto"] | None = None
    """Minutes of training between checkpoints; auto: what repeats least, from the measured time of a save."""
    failures_per_day: PositiveFloat = 1
    """Expected failures of the whole run per day, of any node; for every_minutes=auto."""
    num_to_keep: int = Field(default=3, ge=1)
    """Number of newest checkpoints to keep."""
    num_best_to_keep: int = Field(default=1, ge=0)
    """Number of best checkpoints to keep too, by k-NN, else RankMe; unless it is 0, each evaluated step is saved."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Save each multiple of this step and keep it for good; None: none."""

    def interval_seconds(self, save_seconds: float) -> float | None:
        """Return the training time between two saves, each of which holds training up for `save_seconds`.

        None if steps decide. `auto`: sqrt(2 C M) by Young and Daly, for C seconds per save and M seconds between
        failures. A run loses a share C / T to saves every T seconds and T / (2 M) to repeated steps; T makes the sum
        smallest. C does not include the time of writing in the background, w: it adds w / M for any T.
        """
        if self.every_minutes is None:
            return None
        if self.every_minutes == "auto":
            return math.sqrt(2 * save_seconds * _DAY_SECONDS / self.failures_per_day)
        return 60 * self.every_minutes


class HealthConfig(Settings):
    """Detection of collapse and of non-finite steps."""

    on_collapse: Literal["warn", "stop"] = "warn"
    """warn: print one warning and continue; stop: end the run with exit code 1."""
    on_regression: Literal["warn", "stop"] = "warn"
    """The same for evaluations that are worse than that of the initial weights, by more than the standard error."""
    regression_persistence: int = Field(default=2, ge=1)
    """Number of consecutive evaluations that must be worse than the start."""
    grace_steps: int | None = Field(default=None, ge=0)
    """Steps before uniform targets or a regression count; None: until all warm-ups and 10 % of the run are over."""
    persistence: int = Field(default=5, ge=1)
    """Number of consecutive logged steps that must look collapsed."""
    window: int = Field(default=10, ge=1)
    """Number of logged steps over which mutual information and prototype use are computed."""
    max_skipped: int = Field(default=3, ge=1)
    """Consecutive non-finite (skipped) steps that restart the run from its last checkpoint; the second time, end it."""


class InitConfig(Settings):
    """Initial weights."""

    path: str | None = Field(default=None, min_length=1)
    """A .pth, .ckpt or .safetensors file, local or s3://, or a dinoray run or checkpoint; None: random weights."""
    load: Literal["backbone", "weights", "run"] = "weights"
    """backbone: the backbone alone; weights: all weights and the centre; run: optimiser and epoch too."""

    @field_validator("path")
    @classmethod
    def _path_is_an_address(cls, path: str | None) -> str | None:
        if path is not None:
            normal_uri(path)
        return path
