"""The DINO training step and the plain loop around it. No Ray, no files.

Batch (uint8, rows per image) -> to device -> crop-major pixels -> teacher, student -> loss -> optimiser,
teacher, centre. `torch.distributed` is used if a process group exists; otherwise the step runs in a single
process. Axes: B images per process, G global crops, L local crops, V = G + L, K prototypes.
"""

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dinoray.models import optim
from dinoray.models.dino import DINO, crop_major
from dinoray.models.errors import ConfigError, ResourceError
from dinoray.models.loss import (
    batch_center,
    cross_entropy,
    koleo,
    sinkhorn_probs,
    teacher_probs,
    update_center,
)
from dinoray.models.published import checkpoint as interop
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.data.partition import num_microbatches
from dinoray.pipeline.training.auto import resolve
from dinoray.pipeline.training.config import DINOConfig, HealthConfig, Schedule, StepSettings
from dinoray.pipeline.training.distributed import all_reduce_max, all_reduce_sum, rank
from dinoray.pipeline.training.health import Health, Sums, sums_of
from dinoray.pipeline.training.match_weights import adapt

# Batches may be read-only views. Nothing writes to them, so torch's warning is not needed.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass
class TrainState:
    """Everything that a step reads and changes. `student` is `dino.student`, or its DDP wrapper.

    `step` counts batches. A batch with a non-finite loss or gradient is skipped and counts in `skipped`;
    `skipped_in_a_row` counts the latest consecutive skips. Schedules advance with the batches that are not
    skipped.
    """

    config: DINOConfig
    schedule: Schedule
    dino: DINO
    optimizer: torch.optim.Optimizer
    device: torch.device
    health: Health
    student: nn.Module = field(init=False)
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    has_stepped: bool = field(default=False, init=False)
    """True after the first step in this process."""

    def __post_init__(self) -> None:
        self.student = self.dino.student


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
    ).to(device)
    if weights is not None:
        interop.load(dino, weights)
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


def train_step(state: TrainState, batch: Mapping[str, Any]) -> dict[str, Tensor | float]:
    """Run one step on this process's share of the global batch; advance `state.step` by one.

    `batch`: uint8 arrays or tensors `global_crops` [B, G, H, W, 3] and `local_crops` [B, L, h, w, 3]; never
    written to. Returns the step's metrics, means over all processes: `loss`, `teacher_entropy`, `kl` (nats),
    `grad_norm` (L2 over all gradients before clipping) as 0-d tensors, and the schedules' values as floats.
    If the loss or a gradient is not finite on any process, only `state.step` and the skip counts change.
    Raises ConfigError if the crops do not match the config, ResourceError if the first step does not fit the
    GPU.
    """
    _check(batch, state.config.crops)
    try:
        metrics = _step(state, batch)
    except torch.OutOfMemoryError as error:
        if state.has_stepped:  # a step did fit before: something else uses the memory now
            raise
        parts = state.config.train.accumulate_steps
        raise ResourceError(
            f"{len(batch['global_crops'])} images a step, train.accumulate_steps={parts}, do not fit "
            f"{torch.cuda.get_device_name(state.device)}; raise train.accumulate_steps or resources.train_workers, or "
            "lower train.global_batch_size"
        ) from error
    state.has_stepped = True
    return metrics


def _step(state: TrainState, batch: Mapping[str, Any]) -> dict[str, Tensor | float]:
    config, dino, now = state.config, state.dino, state.schedule.at(state.step - state.skipped)
    optim.set_hyperparameters(state.optimizer, lr=now.lr, weight_decay=now.weight_decay)
    state.optimizer.zero_grad(set_to_none=True)
    torch.manual_seed(drop_path_seed(config.train.seed, state.step, rank()))
    statistics = [
        (buffer, buffer.clone()) for net in (dino.student, dino.teacher) for buffer in net.buffers()
    ]

    seen: list[_MicrobatchResult] = []
    parts = num_microbatches(
        len(batch["global_crops"]), config.train.accumulate_steps, config.train.max_batch_size_per_worker
    )
    for first in range(parts):
        # Each `parts`-th image: over all processes, a microbatch and its batch-norm statistics are then the same for
        # any number of processes.
        part = {crops: batch[crops][first::parts] for crops in ("global_crops", "local_crops")}
        with contextlib.nullcontext() if first == parts - 1 else _without_sync(state.student):
            seen.append(_backward(state, part, now, parts=parts))
    grad_norm = optim.clip_per_parameter(dino.student, config.optim.clip_grad)
    if now.freeze_last_layer:
        optim.drop_last_layer_grads(dino.student.head)
    # One collective for the losses and the centre's sum and count.
    sums = all_reduce_sum(torch.stack([counted.sums for counted in seen]).sum(0))
    loss, pairs_loss, entropy = (sums[:3] / sums[-1]).unbind()

    state.step += 1
    if bool(torch.isfinite(loss + grad_norm)):  # both are equal on all processes
        state.optimizer.step()
        dino.update_teacher(now.teacher_momentum)
        if config.loss.centering == "center":
            dino.center.copy_(update_center(dino.center, sums[3:], momentum=config.loss.center_momentum))
        for counted in seen:
            state.health.add(counted.health)
        state.skipped_in_a_row = 0
    else:
        for buffer, before in statistics:
            buffer.copy_(before)
        state.optimizer.zero_grad(set_to_none=True)
        state.skipped += 1
        state.skipped_in_a_row += 1
    return {
        "loss": loss,
        "teacher_entropy": entropy,
        "kl": pairs_loss - entropy,
        "grad_norm": grad_norm,
        "lr": now.lr,
        "weight_decay": now.weight_decay,
        "teacher_momentum": now.teacher_momentum,
        "teacher_temp": now.teacher_temp,
    }


def drop_path_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of a rank's stochastic depth at `step`, so that a resumed run makes the same draws."""
    return ((seed * 1_000_003 + step) * 65_537 + rank) % (1 << 63)


class _MicrobatchResult(NamedTuple):
    """Result of one microbatch."""

    sums: Tensor
    """[3 + K + 1]: rows times loss, cross-entropy and entropy; then the vector of `batch_center`."""
    health: Sums


def _backward(
    state: TrainState, part: Mapping[str, Any], now: StepSettings, *, parts: int
) -> _MicrobatchResult:
    """Run forward and backward of one microbatch of `parts`.

    The gradients of all microbatches add up to the gradients of the batch's mean loss.
    """
    config, dino = state.config, state.dino
    with autocast(config.train.precision, state.device):
        global_crops = pixels(part["global_crops"], config.crops, state.device)
        local_crops = pixels(part["local_crops"], config.crops, state.device)
        teacher = dino.teacher_output(global_crops)
        student = state.student([global_crops, local_crops] if len(local_crops) else [global_crops])
    if config.loss.centering == "sinkhorn_knopp":
        probs = sinkhorn_probs(
            teacher.logits, now.teacher_temp, reduce_sum=all_reduce_sum, reduce_max=all_reduce_max
        )
    else:
        probs = teacher_probs(teacher.logits, dino.center, now.teacher_temp)
    num_global_crops = config.crops.num_global_crops
    pairs_loss, entropy = cross_entropy(
        probs, student.logits, student_temp=config.loss.student_temp, num_global_crops=num_global_crops
    )
    loss = pairs_loss
    if config.loss.koleo_weight:
        of_crops = student.features[: len(global_crops)].chunk(num_global_crops)
        loss = loss + config.loss.koleo_weight * torch.stack([koleo(crop) for crop in of_crops]).sum()
    (loss / parts).backward()
    losses = torch.stack([loss.detach(), pairs_loss.detach(), entropy]) * len(teacher.logits)
    return _MicrobatchResult(
        torch.cat([losses, batch_center(teacher.logits)]),
        sums_of(probs, teacher.features, entropy=entropy, kl=pairs_loss.detach() - entropy),
    )


def _check(batch: Mapping[str, Any], crops: CropsConfig) -> None:
    """Raise ConfigError if the crops do not match the config, before anything is computed with them."""
    g, s = crops.global_crop_size, crops.local_crop_size
    for name, shape in (
        ("global_crops", (crops.num_global_crops, g, g, 3)),
        ("local_crops", (crops.num_local_crops, s, s, 3)),
    ):
        found = batch.get(name)
        if found is None or tuple(found.shape[1:]) != shape or str(found.dtype).rpartition(".")[2] != "uint8":
            what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise ConfigError(
                f"batch[{name!r}] is {what}, it must be uint8 [B, {', '.join(map(str, shape))}]"
            )
    rows = [len(batch[name]) for name in ("global_crops", "local_crops")]
    if rows[0] != rows[1]:
        raise ConfigError(
            f"batch has {rows[0]} rows of global crops and {rows[1]} of local ones, not as many"
        )


def _without_sync(student: nn.Module) -> contextlib.AbstractContextManager[None]:
    return student.no_sync() if isinstance(student, DistributedDataParallel) else contextlib.nullcontext()


def train(
    state: TrainState,
    batches: Iterable[Mapping[str, Any]],
    *,
    on_step: Callable[[Mapping[str, Any], dict[str, Tensor | float], float], bool | None],
) -> None:
    """Run a step per batch, each followed by `on_step(batch, metrics, wait_seconds)`; end if it returns True.

    `wait_seconds`: time that the step waited for its batch.
    """
    iterator = iter(batches)
    while True:
        asked = time.perf_counter()
        try:
            batch = next(iterator)
        except StopIteration:
            return
        wait_seconds = time.perf_counter() - asked
        if on_step(batch, train_step(state, batch), wait_seconds):
            return


def pixels(crops: Any, config: CropsConfig, device: torch.device) -> Tensor:
    """Convert uint8 [B, C, H, W, 3] to normalised [C*B, 3, H, W] on the device, crop-major.

    The input is not changed. This is the only place where rows per image become rows per crop. Bytes are
    copied to the device, not floats. float32 and contiguous on a CPU. On a GPU in one pass: channels_last, which
    convolutions of bfloat16 need, and as autocast would cast it, where that is on.
    """
    x = torch.as_tensor(crops).to(device, non_blocking=True)
    if device.type == "cuda":
        mean, std = (_per_channel(c, device, torch.float32) for c in (config.pixel_mean, config.pixel_std))
        is_cast = torch.is_autocast_enabled("cuda")
        return normalised(x, mean, std, torch.get_autocast_dtype("cuda") if is_cast else torch.float32)
    x = crop_major(x).float()
    mean, std = (_per_channel(c, device, x.dtype) for c in (config.pixel_mean, config.pixel_std))
    return x.sub_(mean).div_(std)


def normalised(crops: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (crops - mean) / std of uint8 [B, C, H, W, 3] as channels_last [C*B, 3, H, W], in one kernel.

    Computed in float32, rounded to `dtype` at the end; `mean` and `std` [3, 1, 1] float32 are per byte.
    """
    b, c, h, w, _ = crops.shape
    out = torch.empty((c, b, h, w, 3), dtype=dtype, device=crops.device)
    torch.addcmul((-mean / std).view(3), crops.transpose(0, 1), std.reciprocal().view(3), out=out)
    return out.flatten(0, 1).permute(0, 3, 1, 2)


@functools.lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return [3, 1, 1] on the device, of values per byte. Kept, since each copy to a GPU makes the host wait."""
    return torch.tensor(values, device=device, dtype=dtype).view(3, 1, 1) * 255


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return bf16 autocast if `precision` is bf16, or auto on a GPU; otherwise a null context."""
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
