"""The DINO training step and the plain loop around it. No Ray, no files.

Batch (uint8, rows per image) -> to device -> crop-major pixels -> teacher, student -> loss -> optimiser,
teacher, centre. `torch.distributed` is used if a process group exists; otherwise the step runs in a single
process. Axes: B images per process, G global crops, L local crops, V = G + L, K prototypes.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dinoray.models import optim
from dinoray.models.errors import ResourceError
from dinoray.models.loss import (
    batch_center,
    cross_entropy,
    koleo,
    sinkhorn_probs,
    teacher_probs,
    update_center,
)
from dinoray.pipeline.data.partition import num_microbatches
from dinoray.pipeline.training.config import StepSettings
from dinoray.pipeline.training.distributed import all_reduce_max, all_reduce_sum, rank
from dinoray.pipeline.training.health import Sums, sums_of
from dinoray.pipeline.training.pixels import check_batch, pixels
from dinoray.pipeline.training.skips import Kept
from dinoray.pipeline.training.staging import DEVICE_COLUMNS
from dinoray.pipeline.training.state import TrainState

# Batches may be read-only views. Nothing writes to them, so torch's warning is not needed.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def train_step(state: TrainState, batch: Mapping[str, Any]) -> dict[str, Tensor | float]:
    """Run one step on this process's share of the global batch; advance `state.step` by one.

    `batch`: uint8 arrays or tensors `global_crops` [B, G, H, W, 3] and `local_crops` [B, L, h, w, 3]; never
    written to. With `crops.photometric=device` also float32 `global_photometric` [B, G, 11] and `local_photometric`
    [B, L, 11]. Returns the step's metrics, means over all processes: `loss`, `teacher_entropy`, `kl` (nats),
    `grad_norm` (L2 over all gradients before clipping) as 0-d tensors, and the schedules' values as floats.
    With compiled blocks also `recompiled_graphs`, the number since the first step. If the loss or a gradient is not
    finite on any process, only `state.step` changes, and `state.skips` some steps later. The host reads nothing from
    the device.

    Raises ConfigError if the crops do not match the config, ResourceError if the first step does not fit the GPU.
    """
    check_batch(batch, state.config.crops)
    try:
        with state.compilation.step():
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
    if state.compilation.is_on:
        metrics["recompiled_graphs"] = float(state.compilation.num_recompiled)
    return metrics


def _step(state: TrainState, batch: Mapping[str, Any]) -> dict[str, Tensor | float]:
    config, dino, now = state.config, state.dino, state.settings()
    optim.set_hyperparameters(state.optimizer, lr=now.lr, weight_decay=now.weight_decay)
    state.optimizer.zero_grad(set_to_none=True)
    torch.manual_seed(drop_path_seed(config.train.seed, state.step, rank()))
    statistics = Kept((*dino.student.buffers(), *dino.teacher.buffers()))

    seen: list[_MicrobatchResult] = []
    parts = num_microbatches(
        len(batch["global_crops"]), config.train.accumulate_steps, config.train.max_batch_size_per_worker
    )
    for first in range(parts):
        # Each `parts`-th image: over all processes, a microbatch and its batch-norm statistics are then the same for
        # any number of processes.
        part = {name: batch[name][first::parts] for name in DEVICE_COLUMNS if name in batch}
        with contextlib.nullcontext() if first == parts - 1 else _without_sync(state.student):
            seen.append(_backward(state, part, now, parts=parts))
    grad_norm = optim.clip_per_parameter(dino.student, config.optim.clip_grad)
    if now.freeze_last_layer:
        optim.drop_last_layer_grads(dino.student.head)
    # One collective for the losses and the centre's sum and count.
    sums = all_reduce_sum(torch.stack([counted.sums for counted in seen]).sum(0))
    loss, pairs_loss, entropy = (sums[:3] / sums[-1]).unbind()

    state.step += 1
    # Both are equal on all processes. Unless they are finite, what follows changes nothing; the host does not know.
    is_finite = torch.isfinite(loss + grad_norm)
    optim.step_if(state.optimizer, is_finite)
    dino.update_teacher(now.teacher_momentum, is_finite)
    if config.loss.centering == "center":
        center = update_center(dino.center, sums[3:], momentum=config.loss.center_momentum)
        torch.where(is_finite, center, dino.center, out=dino.center)
    for counted in seen:
        state.health.add(counted.health.where(is_finite))
    statistics.give_back_unless(is_finite)
    state.skips.add(state.step, is_finite)
    if state.stage.is_on and state.stage.add(loss, is_finite):
        state.end_stage()
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
        global_crops, local_crops = (
            pixels(part[f"{group}_crops"], config.crops, state.device, part.get(f"{group}_photometric"))
            for group in ("global", "local")
        )
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


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return bf16 autocast if `precision` is bf16, or auto on a GPU; otherwise a null context."""
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
