"""What a training step reads and changes, and how it begins: networks, optimiser, schedules. No Ray, no files.

step.py has the step itself.
"""

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dinoray.models import optim
from dinoray.models.compiled import Backend, Compilation, compile_blocks
from dinoray.models.dino import DINO
from dinoray.models.published import checkpoint as interop
from dinoray.models.recompute import recompute_blocks
from dinoray.pipeline.training.auto import resolve
from dinoray.pipeline.training.config import DINOConfig, HealthConfig, Schedule, StepSettings
from dinoray.pipeline.training.ddp import wrapped
from dinoray.pipeline.training.frozen_stage import FrozenStage
from dinoray.pipeline.training.health import Health
from dinoray.pipeline.training.match_weights import adapt
from dinoray.pipeline.training.skips import Skips


@dataclass
class TrainState:
    """Everything that a step reads and changes. `student` is `dino.student`, or its DDP wrapper.

    `step` counts batches. A batch with a non-finite loss or gradient is skipped: it changes nothing else. Schedules
    advance with the batches that are not skipped; they wait for a skipped one once its skip is LAG steps old.
    """

    config: DINOConfig
    schedule: Schedule
    dino: DINO
    optimizer: torch.optim.Optimizer
    device: torch.device
    health: Health
    student: nn.Module = field(init=False)
    skips: Skips = field(init=False)
    stage: FrozenStage = field(init=False)
    compilation: Compilation = field(default_factory=Compilation, init=False)
    step: int = 0
    has_stepped: bool = field(default=False, init=False)
    """True after the first step in this process."""

    def __post_init__(self) -> None:
        self.student = self.dino.student
        self.skips = Skips(self.device)
        self.stage = FrozenStage(
            self.config.init.freeze_steps, total_steps=self.schedule.total_steps, device=self.device
        )
        if self.stage.is_on:
            self.dino.freeze_backbone()

    def compile(self, *, backend: Backend = "inductor") -> None:
        """Compile blocks as train.compile asks for. Raises as `compile_blocks`."""
        backbones = (self.dino.student.backbone, self.dino.teacher.backbone)
        self.compilation = compile_blocks(backbones, self.config.train.compile, self.device, backend=backend)

    @property
    def is_compiling(self) -> bool:
        """Whether the next step compiles blocks, which may take minutes."""
        return self.compilation.is_on and not self.has_stepped

    @property
    def skipped(self) -> int:
        """The number of skipped steps that are known so far; of all steps after `skips.settle`."""
        return self.skips.total

    @property
    def skipped_in_a_row(self) -> int:
        """The number of latest consecutive skips, as for `skipped`."""
        return self.skips.in_a_row

    def settings(self) -> StepSettings:
        """Return the schedules' values for the step about to run."""
        return self.schedule.at(self.step - self.skips.before_lag, thawed_at=self.stage.ended_at)

    def end_stage(self) -> None:
        """Let the backbone learn from the next step on, and begin its schedules there. All ranks call it alike."""
        self.stage.ended_at = self.step - self.skips.before_lag
        self.thaw()

    def thaw(self) -> None:
        """Let the backbone learn; the next step is a first one: it compiles blocks and takes more memory."""
        self.dino.thaw_backbone()
        self.compilation.restart()
        self.has_stepped = False
        if isinstance(self.student, DistributedDataParallel):
            # DDP adds up what could learn when it was made. The former wrapper gives its hooks back when it is freed.
            self.student = self.dino.student
            gc.collect()
            self.student = wrapped(self.dino.student, self.device)


def build_state(
    config: DINOConfig,
    *,
    num_images: int,
    device: torch.device | str = "cpu",
    official: Mapping[str, Any] | None = None,
    health: HealthConfig | None = None,
    resumed: bool = False,
) -> TrainState:
    """Build seeded networks, optimiser and schedules, at step 0. `num_images` is the length of an epoch.

    `official`: a state dict of the published code that the networks, and the centre if present, start from.
    It may be a whole checkpoint, one network or a bare backbone; position embeddings are then resized as
    published. `resumed`: a checkpoint will be loaded, so `backbone.pretrained` downloads nothing. `auto` in
    the config becomes a number. Raises ConfigError if the weights do not fit, DataError if `official` holds
    none.
    """
    config = resolve(config, num_images=num_images).config
    weights = None if official is None else interop.parse(official)
    if weights is not None:
        config = adapt(config, weights)
    torch.manual_seed(config.train.seed)
    dino = DINO(
        config.backbone,
        config.head,
        crop_sizes=config.crops.crop_sizes,
        pretrained=config.backbone.pretrained and not resumed,
        in_chans=config.crops.channels,
    ).to(device)
    if weights is not None:
        interop.load(dino, weights)
    recompute_blocks(dino.student.backbone, config.train.activation_checkpointing)
    schedule = Schedule(config, num_images=num_images)
    health = health or HealthConfig()
    grace = max(schedule.settled_step(), schedule.total_steps // 10)
    return TrainState(
        config=config,
        schedule=schedule,
        dino=dino,
        optimizer=optim.build_optimizer(config.optim, dino.student),
        device=torch.device(device),
        health=Health(health, grace_steps=grace if health.grace_steps is None else health.grace_steps),
    )
