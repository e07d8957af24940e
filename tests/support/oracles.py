"""Slow, obvious twins of the fast code: loops over what the code does in one call, float64 where it is float32.

The twins of multi-crop stand in crops_oracle.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dinoray.pipeline.training.config import DINOConfig, StepSettings


def double_loop_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    center: Tensor,
    *,
    teacher_temp: float,
    student_temp: float,
    num_global_crops: int,
) -> Tensor:
    """DINO's loss, one pair of crops and one image at a time, in float64. Row v * B + b is crop v of image b."""
    num_images = len(teacher_logits) // num_global_crops
    num_crops = len(student_logits) // num_images
    terms = []
    for g in range(num_global_crops):
        for v in range(num_crops):
            if v == g:
                continue
            for b in range(num_images):
                t, s = (
                    teacher_logits[g * num_images + b].double(),
                    student_logits[v * num_images + b].double(),
                )
                q = torch.softmax((t - center.double()) / teacher_temp, dim=0)
                terms.append(-(q * torch.log_softmax(s / student_temp, dim=0)).sum())
    return torch.stack(terms).mean()


def published_cosine(base: float, final: float, *, total_steps: int, warmup_steps: int = 0) -> list[float]:
    """DINO's table of a schedule: a ramp with both ends, then half a cosine without its last point."""
    ramp = np.linspace(0, base, warmup_steps).tolist()
    rest = total_steps - warmup_steps
    return ramp + [final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]


def published_temps(base: float, warmup: float, *, warmup_epochs: int, epochs: int) -> list[float]:
    """DINO's table of teacher temperatures, one per epoch."""
    return np.linspace(warmup, base, warmup_epochs).tolist() + [base] * (epochs - warmup_epochs)


def clip_one_by_one(grads: Sequence[Tensor], max_norm: float) -> list[Tensor]:
    """Each gradient on its own, scaled down to `max_norm` when it is longer."""
    clipped = []
    for grad in grads:
        norm = math.sqrt(sum(x * x for x in grad.double().flatten().tolist()))
        clipped.append(grad * (max_norm / norm) if norm > max_norm else grad)
    return clipped


def prototype_logits(z: Tensor, weight_v: Tensor, weight_g: Tensor) -> Tensor:
    """Cosine of each bottleneck vector with each prototype, times the prototype's magnitude; float64."""
    z, weight_v, weight_g = (x.detach().double() for x in (z, weight_v, weight_g))
    rows = [
        [
            float(g * torch.dot(row, v) / (row.norm() * v.norm()))
            for v, g in zip(weight_v, weight_g, strict=True)
        ]
        for row in z
    ]
    return torch.tensor(rows, dtype=torch.float64)


class WrittenOutRun:
    """DINO with SGD, crop by crop, pair by pair and parameter by parameter: no code of models/ but the networks."""

    def __init__(self, student: nn.Module, teacher: nn.Module, config: DINOConfig) -> None:
        self.student, self.teacher, self.config = student, teacher, config
        self.center = torch.zeros(config.head.out_dim)
        self.velocity: dict[str, Tensor] = {}

    def step(self, batch: Mapping[str, NDArray[Any]], now: StepSettings) -> float:
        """One step; returns the loss."""
        c = self.config
        crops = [self._pixels(batch["global_crops"][:, i]) for i in range(c.crops.num_global_crops)]
        crops += [self._pixels(batch["local_crops"][:, i]) for i in range(c.crops.num_local_crops)]
        with torch.no_grad():
            teacher = [self._logits(self.teacher, x) for x in crops[: c.crops.num_global_crops]]
        student = [self._logits(self.student, x) for x in crops]
        pairs = []
        for g, t in enumerate(teacher):
            q = torch.softmax((t - self.center) / now.teacher_temp, dim=1)
            for v, s in enumerate(student):
                if v != g:
                    pairs.append(-(q * torch.log_softmax(s / c.loss.student_temp, dim=1)).sum(1).mean())
        loss = torch.stack(pairs).mean()
        trained = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        grads = list(torch.autograd.grad(loss, list(trained.values())))
        if c.optim.clip_grad:
            grads = clip_one_by_one(grads, c.optim.clip_grad)
        with torch.no_grad():
            for (name, p), grad in zip(trained.items(), grads, strict=True):
                if now.freeze_last_layer and "last_layer" in name:
                    continue
                decays = p.ndim > 1 and not name.endswith("bias")
                push = grad + (now.weight_decay * p if decays else 0)
                self.velocity[name] = push + c.optim.momentum * self.velocity.get(name, torch.zeros_like(p))
                p.sub_(now.lr * self.velocity[name])
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.copy_(now.teacher_momentum * old + (1 - now.teacher_momentum) * new)
            m = c.loss.center_momentum
            self.center = m * self.center + (1 - m) * torch.cat(teacher).mean(0)
        return loss.item()

    def _pixels(self, images: NDArray[np.uint8]) -> Tensor:
        mean, std = np.array(self.config.crops.pixel_mean), np.array(self.config.crops.pixel_std)
        return torch.from_numpy(((images / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2).copy())

    @staticmethod
    def _logits(network: Any, x: Tensor) -> Tensor:
        return network.head(network.backbone(x))


def nearest_vote(
    bank: NDArray[np.float32],
    labels: Sequence[str],
    query: NDArray[np.float32],
    *,
    k: int,
    temperature: float,
) -> str:
    """Label of one query by weighted k-NN, one distance at a time in float64; the first of equals wins."""
    q = query.astype(np.float64) / np.linalg.norm(query.astype(np.float64))
    scored = []
    for row, label in zip(bank.astype(np.float64), labels, strict=True):
        scored.append((float(q @ row / np.linalg.norm(row)), label))
    votes: dict[str, float] = dict.fromkeys(labels, 0.0)
    for cosine, label in sorted(scored, key=lambda pair: -pair[0])[:k]:
        votes[label] += math.exp(cosine / temperature)
    return max(votes, key=lambda label: votes[label])


def group_loads(image_groups: Sequence[int], *, capacity: int) -> int:
    """Groups that a reader loads which keeps the `capacity` groups that it used last."""
    kept: list[int] = []
    loads = 0
    for group in image_groups:
        loads += group not in kept
        kept = [group, *(g for g in kept if g != group)][:capacity]
    return loads


def leave_one_out_accuracy(features: NDArray[np.float64], labels: Sequence[str], *, k: int) -> float:
    """Plain majority k-NN accuracy of each row among all others, by Euclidean distance."""
    hits = 0
    for i, row in enumerate(features):
        distance = ((features - row) ** 2).sum(1)
        distance[i] = np.inf
        near = [labels[j] for j in np.argsort(distance, kind="stable")[:k]]
        hits += max(near, key=near.count) == labels[i]
    return hits / len(labels)


def image_features(
    images: Sequence[Any], describe: Callable[[Any], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """One standardised row per image."""
    rows = np.stack([describe(image) for image in images])
    return (rows - rows.mean(0)) / (rows.std(0) + 1e-9)
