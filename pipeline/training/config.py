"""The config of the DINO algorithm, and all its schedules as functions of step. No Ray, no files.

Each section is defined beside the part that it configures. The schedules need the length of an epoch: it
converts epochs to steps and `auto` to numbers.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, PositiveFloat, field_validator, model_validator

from dinoray.models import schedules
from dinoray.models.config import (
    BackboneConfig,
    Checkpointing,
    Compile,
    HeadConfig,
    LossConfig,
    OptimConfig,
    TeacherConfig,
    timm_name,
)
from dinoray.models.schedules import frozen_limits, scaled_lr
from dinoray.models.settings import Auto, Settings, number
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
    """Compile blocks of both networks, and the loss, by torch.compile; auto: on a GPU, unless a compiler is missing."""
    seed: int = Field(default=0, ge=0)
    """Seed of weights, image order, crops and stochastic depth."""


class FreezeConfig(Settings):
    """First stage of a run that starts from weights: the backbone is frozen while fresh heads converge."""

    freeze_steps: Annotated[int, Field(ge=0)] | Auto = 0
    """Steps at the start in which only heads learn; auto: until the loss is flat, at least 1,000 or 10 %; 0: none."""
    freeze_base_lr: float = Field(default=5e-4, gt=0)
    """Learning rate of the heads in these steps at a global batch of 256, constant; DINO's default for fresh heads."""
    freeze_teacher_momentum: float = Field(default=0.996, ge=0, le=1)
    """EMA coefficient of the teacher's head in these steps; DINO's default for fresh heads."""


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
    init: FreezeConfig = FreezeConfig()


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
        self._asked_warmup_steps = round(self.steps(config.optim.warmup_epochs))
        self.warmup_steps = schedules.cap_warmup(self._asked_warmup_steps, self.total_steps)
        self.warmup_temp_epochs = schedules.cap_warmup(
            config.loss.warmup_teacher_temp_epochs, math.ceil(config.train.epochs)
        )
        self.freeze_steps = round(self.steps(config.optim.freeze_last_layer_epochs))
        self.most_frozen_steps = frozen_limits(config.init.freeze_steps, self.total_steps).greatest

    def epoch(self, step: int) -> int:
        """Return the epoch of the first image of `step`."""
        return step * self._config.train.global_batch_size // self._num_images

    def steps(self, epochs: float) -> float:
        """Return the number of steps in `epochs`, not rounded."""
        return epochs * self._num_images / self._config.train.global_batch_size

    def settled_step(self) -> int:
        """Return the first step after the warm-ups of both the learning rate and the teacher temperature.

        While the backbone is frozen, no learning rate warms up; that may last `most_frozen_steps`.
        """
        return max(self.most_frozen_steps + self.warmup_steps, math.ceil(self.steps(self.warmup_temp_epochs)))

    def at(self, step: int, *, thawed_at: int | None = 0) -> StepSettings:
        """Return the settings of `step`, the step about to run.

        `thawed_at`: the step from which the backbone learns, at which the courses of learning rate, weight decay and
        momentum begin; None while it is frozen.
        """
        c = self._config
        lr, weight_decay, momentum = (
            scaled_lr(c.init.freeze_base_lr, c.train.global_batch_size),
            c.optim.weight_decay,
            c.init.freeze_teacher_momentum,
        )
        if thawed_at is not None:
            span = step - thawed_at, self.total_steps - thawed_at
            peak = scaled_lr(c.optim.base_lr, c.train.global_batch_size)
            warmup_steps = schedules.cap_warmup(self._asked_warmup_steps, span[1])
            lr = self._course(*span, peak, c.optim.min_lr, warmup_steps=warmup_steps)
            weight_decay = self._course(*span, c.optim.weight_decay, c.optim.final_weight_decay)
            momentum = self._course(
                *span, number(c.teacher.teacher_momentum), c.teacher.final_teacher_momentum
            )
        return StepSettings(
            lr=lr,
            weight_decay=weight_decay,
            teacher_momentum=momentum,
            teacher_temp=schedules.teacher_temp(
                self.epoch(step),
                base=number(c.loss.teacher_temp),
                warmup=c.loss.warmup_teacher_temp,
                warmup_epochs=self.warmup_temp_epochs,
            ),
            freeze_last_layer=step < self.freeze_steps,
        )

    def _course(
        self, step: int, total_steps: int, base: float, final: float, *, warmup_steps: int = 0
    ) -> float:
        if self._config.train.schedule == "constant":
            return schedules.warmup_constant(step, base=base, warmup_steps=warmup_steps)
        return schedules.warmup_cosine(
            step, base=base, final=final, total_steps=total_steps, warmup_steps=warmup_steps
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


class InitConfig(FreezeConfig):
    """Initial weights, and the stage after them in which the backbone is frozen."""

    # `from` is a keyword of Python. Files and command lines have it, and may have `path`, as earlier versions wrote.
    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    path: str | None = Field(default=None, min_length=1, alias="from")
    """timm:NAME, a .pth, .ckpt or .safetensors file, local or s3://, a dinoray run or checkpoint; None: random."""
    load: Literal["backbone", "weights", "run"] = "weights"
    """backbone: the backbone alone; weights: all weights and the centre; run: optimiser and epoch too."""

    @field_validator("path")
    @classmethod
    def _path_is_an_address(cls, path: str | None) -> str | None:
        if path is not None and timm_name(path) is None:
            normal_uri(path)
        return path

    @model_validator(mode="after")
    def _heads_are_fresh(self) -> "InitConfig":
        if self.load == "run" and self.freeze_steps != 0:
            raise ValueError(
                f"init.freeze_steps={self.freeze_steps} is for fresh heads, but init.load=run continues with those of "
                "the run; set init.freeze_steps=0, or init.load=backbone"
            )
        return self
