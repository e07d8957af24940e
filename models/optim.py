"""Parameter groups, optimisers, lr scaling by global batch, per-parameter clip, last-layer freeze."""

from typing import Literal

import timm.optim
import torch
from pydantic import Field
from torch import Tensor, nn

from models.settings import Settings


class OptimConfig(Settings):
    """Optimiser and its schedules."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    """AdamW for ViTs; SGD or LARS (timm) for ResNets. Both of the latter use `momentum`."""
    base_lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate at a global batch of 256; scaled linearly with the global batch."""
    min_lr: float = Field(default=1e-6, ge=0)
    """Learning rate that the cosine ends at; not scaled."""
    warmup_epochs: float = Field(default=10, ge=0)
    """Epochs of linear warm-up from 0."""
    weight_decay: float = Field(default=0.04, ge=0)
    """Weight decay at the first step; biases and 1-D parameters have none."""
    final_weight_decay: float = Field(default=0.4, ge=0)
    """Weight decay that the cosine ends at."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD and LARS."""
    clip_grad: float = Field(default=3.0, ge=0)
    """Largest L2 norm of each parameter's gradient, tensor by tensor; 0 switches clipping off."""
    freeze_last_layer_epochs: float = Field(default=1, ge=0)
    """Epochs at the start in which the prototype layer gets no update."""


def param_groups(student: nn.Module) -> list[dict]:
    """Group 0: decayed parameters; group 1: biases and 1-D parameters, never decayed. Frozen ones are left out."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in student.named_parameters():
        if p.requires_grad:
            (plain if name.endswith(".bias") or p.ndim == 1 else decayed).append(p)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


def build_optimizer(config: OptimConfig, student: nn.Module) -> torch.optim.Optimizer:
    """The optimiser over `param_groups(student)`; lr and weight decay are set before each step."""
    groups = param_groups(student)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)
    return timm.optim.Lars(groups, lr=0.0, momentum=config.momentum)


def scaled_lr(base_lr: float, global_batch_size: int) -> float:
    """Linear scaling rule: `base_lr` holds for a global batch of 256."""
    return base_lr * global_batch_size / 256


def set_hyperparameters(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Write this step's values: lr into every group, weight decay into group 0."""
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = lr
        if i == 0:
            group["weight_decay"] = weight_decay


@torch.no_grad()
def clip_per_parameter(student: nn.Module, max_norm: float) -> Tensor:
    """Clip each gradient tensor to `max_norm` (0: leave it), without a host sync; return the global norm before.

    Differs from `torch.nn.utils.clip_grad_norm_`, which scales all gradients by one norm.
    """
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    if max_norm > 0:
        torch._foreach_mul_(grads, list((max_norm / (norms + 1e-6)).clamp(max=1.0).unbind()))
    return norms.norm()


def drop_last_layer_grads(head: nn.Module) -> None:
    """Freeze the prototype layer for this step: no gradient means no update, no decay and no optimiser moments."""
    for p in head.last_layer.parameters():  # type: ignore[union-attr]
        p.grad = None
